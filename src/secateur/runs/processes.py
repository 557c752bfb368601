"""Run work in processes of its own, and measure them from outside."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from secateur.runs.errors import SecateurError

# Nothing large is imported here: a child's peak resident size starts at that of the process that
# forked it, so a process that measures others has to stay small. Work that needs torch is `apart`.

_SHOWN = 3000

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


def measure(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Measured:
    """Run a command to its end, its output in ``log``, and measure it.

    Raises:
        SecateurError: it failed; the end of its output is shown.
    """
    os.sync()  # what the run before wrote is not this one's work
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise _failure(command, process.returncode, log)
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process, so that this one imports nothing large."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args, **kwargs).result()


def output_of(command: Sequence[str], log: Path) -> str:
    """Run a command to its end; return what it prints, its other output in ``log``.

    Raises:
        SecateurError: it failed; the end of its output is shown.
    """
    with log.open("wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
    if done.returncode != 0:
        raise _failure(command, done.returncode, log)
    return done.stdout.decode()


def _failure(command: Sequence[str], status: int, log: Path) -> SecateurError:
    end = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:]
    return SecateurError(f"{shlex.join(command)} ended with status {status}:\n{end}")
