"""How the command line ends: one sentence, and an exit code that says of which kind it is."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import metadata
from types import FrameType
from typing import NoReturn

from secateur.runs.errors import (
    SecateurError,
    is_out_of_memory,
    is_panic,
    keep_trace,
    kept_trace,
    reason_of,
)
from secateur.runs.files import cache_folder

REFUSED = 1
# What sysexits.h calls EX_SOFTWARE.
FAULT = 70

_STOPPED = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
# What these have finished is kept.
_RESUMING = ("prune", "shrink", "recover", "train", "compare", "demo")


class _Stopped(BaseException):
    """A signal asked the process to end; nothing on the way may take it for an error."""


@contextmanager
def ending() -> Iterator[None]:
    """Turn whatever is raised within into a sentence and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show must not end a run that is finished.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not (sys.warnoptions or _debugging()):
        # Warnings of libraries are for those who call them.
        warnings.simplefilter("ignore")
    for number in _STOPPED:
        # A shell has its background jobs ignore interrupts.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (_Stopped, KeyboardInterrupt) as stopped:
        _end_stopped(stopped)
    except BrokenPipeError:
        # Whoever read the output has enough; what is left in the buffer must not complain either.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(REFUSED)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if _debugging():
            traceback.print_exception(error)
        _end(error)


def _end(error: BaseException) -> NoReturn:
    if isinstance(error, SecateurError):
        _say_and_exit(REFUSED, str(error))
    if is_out_of_memory(error):
        _say_and_exit(
            REFUSED,
            f"Memory ran out ({_first_line(error)}); free some, use a smaller batch, shorter "
            "windows or another device; `secateur estimate` tells what a run needs.",
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        _say_and_exit(
            REFUSED, "A path begins with ~ and the name of no user here; write the path out."
        )
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        _say_and_exit(REFUSED, f"{reason_of(error)}: the link leads to itself; name another path.")
    # What a library raises under this name without a number does not come from the system.
    if isinstance(error, OSError) and error.errno is not None:
        reason = reason_of(error)
        if error.filename is None:
            _say_and_exit(
                REFUSED, f"The system refuses to go on ({reason}); mend that and run it again."
            )
        _say_and_exit(REFUSED, f"{error.filename} cannot be used ({reason}); check the path.")
    _end_with_a_fault(error)


def _end_with_a_fault(error: BaseException) -> NoReturn:
    own = cache_folder() / "traces" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        place = str(kept_trace(error) or keep_trace(error, own))
    except OSError:
        place = "what SECATEUR_DEBUG=1 shows"
    kind, reason = type(error).__name__, reason_of(error)
    what = reason if reason.startswith(kind) else f"{kind}: {reason}"
    _say_and_exit(
        FAULT,
        f"Something went wrong that nobody foresaw ({what}).\nThis is a fault of secateur; please "
        f"report it to {_issues()} together with {place}.",
    )


def _issues() -> str:
    """Where the package says that faults are reported."""
    urls = [str(each) for each in metadata("secateur").get_all("Project-URL") or []]
    named = {name.lower(): address for name, _, address in (each.partition(", ") for each in urls)}
    return named.get("issues", "its maintainers")


def _end_stopped(stopped: BaseException) -> NoReturn:
    number = stopped.args[0] if isinstance(stopped, _Stopped) else signal.SIGINT
    resumes = next((word for word in sys.argv[1:] if not word.startswith("-")), "") in _RESUMING
    rest = "; the same command goes on from what is saved." if resumes else "."
    _say_and_exit(128 + number, _STOPPED[number] + rest)


def _say_and_exit(code: int, sentence: str) -> NoReturn:
    from secateur.cli.console import complain

    complain(sentence)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _debugging() -> bool:
    return os.environ.get("SECATEUR_DEBUG", "") not in ("", "0")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
