"""The command line: a thin shell over the Python functions."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from secateur.cli.measure import compare, evaluate, inspect, simulate
from secateur.cli.prune import estimate, plan, prune
from secateur.cli.show import demo, ls, report
from secateur.cli.shrink import shrink
from secateur.cli.train import recover, train
from secateur.runs.errors import SecateurError

app = typer.Typer(
    name="secateur",
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
    "compare": compare,
    "inspect": inspect,
    "simulate": simulate,
    "report": report,
    "ls": ls,
    "demo": demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name, short_help=_command.__doc__)(_command)

_STOPPED = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
# What these have finished is kept.
_RESUMING = ("prune", "shrink", "recover", "train", "compare", "demo")


class _Stopped(BaseException):
    """A signal asked the process to end; nothing on the way may take it for an error."""


def main() -> None:
    """Run the command line; errors a user can act on are one sentence and exit code 1."""
    # Libraries that print progress of their own would break ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for number in _STOPPED:
        # A shell has its background jobs ignore interrupts.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        app()
    except SecateurError as error:
        _end(1, str(error))
    except OSError as error:
        reason = (error.strerror or str(error).partition("\n")[0]).lower()
        if error.filename is None:
            _end(1, f"The system refuses to go on ({reason}); mend that and run it again.")
        _end(1, f"{error.filename} cannot be used ({reason}); check the path.")
    except _Stopped as stopped:
        number = stopped.args[0]
        resumes = sys.argv[1:2] and sys.argv[1] in _RESUMING
        rest = "; the same command goes on from what is saved." if resumes else "."
        _end(128 + number, _STOPPED[number] + rest)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _end(code: int, sentence: str) -> NoReturn:
    from secateur.cli.console import complain

    complain(sentence)
    sys.exit(code)
