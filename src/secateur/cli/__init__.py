"""The command line: a thin shell over the Python functions, one module per command."""

from __future__ import annotations

import os
import sys

import typer

from secateur.cli.compare import compare
from secateur.cli.demo import demo
from secateur.cli.estimate import estimate
from secateur.cli.evaluate import evaluate
from secateur.cli.inspect import inspect
from secateur.cli.ls import ls
from secateur.cli.plan import plan
from secateur.cli.prune import prune
from secateur.cli.recover import recover
from secateur.cli.report import report
from secateur.cli.shrink import shrink
from secateur.cli.simulate import simulate
from secateur.cli.train import train
from secateur.runs.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Prune large language models so that it pays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(prune)
app.command()(plan)
app.command()(shrink)
app.command()(recover)
app.command()(train)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(inspect)
app.command()(simulate)
app.command()(report)
app.command()(estimate)
app.command()(ls)
app.command()(demo)


def main() -> None:
    """Run the command line; errors a user can act on are one sentence and exit code 1."""
    # Libraries that print progress of their own would break ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except SecateurError as error:
        _complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("Interrupted; the same command goes on from what is saved.")
        sys.exit(130)


def _complain(message: str) -> None:
    from secateur.cli.console import stderr

    sentence = message[:1].upper() + message[1:]
    stderr.print(f"[bold red]error[/] {sentence}", highlight=False, soft_wrap=True)
