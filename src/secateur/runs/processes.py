"""Run work in processes of its own, and measure them from outside."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, ParamSpec, TypeVar, cast

from secateur.runs.errors import SecateurError

# Nothing large is imported here: a child's peak resident size starts at that of the process that
# forked it, so a process that measures others has to stay small. Work that needs torch is `apart`.

_SHOWN = 3000
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What a process cost, seen from outside.

    Attributes:
        seconds: wall time from start to exit.
        cpu_seconds: user and system time; far below cores x seconds if others used the machine.
        peak_bytes: largest resident size.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end, its output in ``log``, and measure it.

    Raises:
        SecateurError: it failed; the end of its output is shown.
    """
    os.sync()  # what the run before wrote is not this one's work
    with log.open("wb") as output:
        started = time.perf_counter()
        with _child(command, output, subprocess.STDOUT) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
    _check(command, process.returncode, log)
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def output_of(command: Sequence[str], log: Path) -> str:
    """Run a command to its end; return what it prints, its other output in ``log``.

    Raises:
        SecateurError: it failed; the end of its output is shown.
    """
    with log.open("wb") as errors, _child(command, subprocess.PIPE, errors) as process:
        printed, _ = process.communicate()
    _check(command, process.returncode, log)
    return printed.decode()


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process, so that this one imports nothing large."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    call = partial(function, *args, **kwargs)
    process = spawn.Process(target=_answer, args=(call, sender, os.getpid()))
    process.start()
    sender.close()
    try:
        value, error = receiver.recv()
    except EOFError:
        process.join()
        raise SecateurError(
            f"A process of its own ended with status {process.exitcode} before its work was done; "
            "there may be too little memory."
        ) from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return cast(T, value)


def _answer(call: Callable[[], object], sender: Connection, parent: int) -> None:
    end_with(parent)
    try:
        sender.send((call(), None))
    except Exception as error:
        sender.send((None, error))


@contextmanager
def _child(
    command: Sequence[str], output: IO[bytes] | int, errors: IO[bytes] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this one, with all that it has started where that is possible."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            # A group of its own, which can be ended as a whole.
            start_new_session=True,
            preexec_fn=partial(end_with, os.getpid()),
        )
    except OSError as error:
        raise SecateurError(
            f"{command[0]} cannot be started ({error.strerror}); check its path and modes."
        ) from error
    try:
        yield process
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies, however that happens."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _check(command: Sequence[str], status: int, log: Path) -> None:
    if status != 0:
        end = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:]
        raise SecateurError(f"{shlex.join(command)} ended with status {status}:\n{end}")
