"""Run the command line in processes that are killed, that meet, or whose disk fills up."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from secateur.runs.files import write_text

# One process imports everything, and all others come from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "secateur.cli",
        "secateur.evaluation.evaluate",
        "secateur.pruning.prune",
        "secateur.shrinking.curve",
        "secateur.shrinking.shrink",
        "secateur.training.recover",
        "secateur.report.terminal",
    ]
)
# What times and processes decide, not the command.
_VOLATILE = {"manifest.json", "report.html", "log.jsonl", "report.json", "curve.json", "curve.svg"}


class Command:
    """A command line in a process of its own.

    Args:
        words: of the command line, without the program.
        log: file for all that it prints.
        watched: the folder whose changes are counted.
        kill_at: number of the change before which the process kills itself.
        changes: which calls count as changes.
    """

    def __init__(
        self,
        words: Sequence[object],
        log: Path,
        watched: Path | None = None,
        kill_at: int | None = None,
        changes: Sequence[str] = ("replace",),
    ) -> None:
        self._log = log
        arguments = (list(map(str, words)), log, watched, kill_at, changes)
        self._process: ForkServerProcess = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        pid = self._process.pid
        if pid is not None and self._process.is_alive():
            os.kill(pid, number)

    def code(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        self._process.join(600)
        assert self._process.exitcode is not None, self.printed()
        return self._process.exitcode

    def printed(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace") if self._log.is_file() else ""


def _run(
    words: list[str], log: Path, watched: Path | None, kill_at: int | None, changes: Sequence[str]
) -> None:
    import torch

    from secateur.cli import main

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if watched is not None:
        counted = _count_changes(watched, kill_at, changes)
    sys.argv = ["secateur", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if watched is not None:
            write_text(log.with_suffix(".changes"), str(counted()))
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


def _count_changes(watched: Path, kill_at: int | None, changes: Sequence[str]) -> Callable[[], int]:
    """Count changes of a folder, and kill the process before one of them."""
    done = 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def change(path: object, *rest: object, **options: object) -> object:
            nonlocal done
            inside = isinstance(path, str | os.PathLike) and str(watched) in str(path)
            if inside or options.get("dir_fd") is not None:
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
            return real(path, *rest, **options)

        return change

    for name in changes:
        setattr(os, name, counting(getattr(os, name)))
    return lambda: done


def changes_of(log: Path) -> int:
    """How many changes a command whose folder was watched has made."""
    return int(log.with_suffix(".changes").read_text())


def result_of(output: Path) -> dict[str, str]:
    """Digests of all that a command decides, by name; a result without leftovers is expected."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        assert not path.name.startswith("."), f"{name} is left behind"
        assert path.name not in ("lock", "start", "refitted", "saving"), f"{name} is left behind"
        if path.is_file() and path.name not in _VOLATILE and "pruned.json" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = output / "secateur" / "manifest.json"
    if manifest.is_file():
        assert json.loads(manifest.read_text())["complete"]
        assert (output / "secateur" / "report.html").is_file(), "the page is missing"
    return found


def fresh(output: Path) -> Path:
    """A path at which nothing is."""
    shutil.rmtree(output, ignore_errors=True)
    return output


def after(seconds: float, command: Command, number: signal.Signals) -> int:
    """Send a signal some time after the start; return how the command ended."""
    time.sleep(seconds)
    command.send(number)
    return command.code()
