"""The command line: a thin shell over the Python functions."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from secateur.cli.bench import bench
from secateur.cli.ending import ending
from secateur.cli.export import export
from secateur.cli.flags import current_forms
from secateur.cli.measure import compare, evaluate, inspect, simulate
from secateur.cli.prune import estimate, plan, prune
from secateur.cli.show import demo, ls, report
from secateur.cli.shrink import shrink
from secateur.cli.targets import targets
from secateur.cli.train import recover, train


class _Commands(TyperGroup):
    """All commands; flags of earlier versions keep their meaning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, current_forms(args))


app = typer.Typer(
    name="secateur",
    cls=_Commands,
    help="Prune large language models so that it pays.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "prune": prune,
    "plan": plan,
    "estimate": estimate,
    "shrink": shrink,
    "recover": recover,
    "train": train,
    "eval": evaluate,
    "bench": bench,
    "targets": targets,
    "compare": compare,
    "inspect": inspect,
    "simulate": simulate,
    "export": export,
    "report": report,
    "ls": ls,
    "demo": demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name, short_help=_command.__doc__)(_command)


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="show where an error comes from, as SECATEUR_DEBUG=1 does"),
    ] = False,
) -> None:
    """Prune large language models so that it pays."""
    if debug:
        os.environ["SECATEUR_DEBUG"] = "1"


def main() -> None:
    """Run the command line, and end it with one sentence whatever happens.

    Exit codes: 0 done, 1 a problem the user can act on, 2 wrong usage, 70 a fault of secateur,
    130 interrupted, 143 terminated.
    """
    # Libraries that print progress of their own would break ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with ending():
        app()
