"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from secateur.runs.errors import SecateurError
from secateur.runs.files import writing

LOCK = "lock"
# A lock that is just being given back is free within this time.
_PATIENCE_SECONDS = 0.2


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; the system gives it back when the process dies.

    Args:
        folder: where the lock file is; made if it is missing.

    Raises:
        SecateurError: another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=_PATIENCE_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise SecateurError(_held(path)) from error
    try:
        path.write_text(json.dumps(_holder()), encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever waits for this very file notices, and makes its own.
        path.unlink(missing_ok=True)
        lock.release()


def require_free(folder: Path) -> None:
    """Raise SecateurError if a living process holds the lock of an output folder."""
    path = folder / LOCK
    if path.is_file():
        with writing(path):
            try:
                FileLock(path, timeout=_PATIENCE_SECONDS).acquire().lock.release()
            except Timeout as error:
                raise SecateurError(_held(path)) from error


def _holder() -> dict[str, object]:
    program, *words = sys.argv
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "command": " ".join([Path(program).name, *words]),
    }


def _held(path: Path) -> str:
    output = path.parent.parent
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        place = "" if holder["host"] == platform.node() else f" on {holder['host']}"
        who = f"process {holder['pid']}{place} ({holder['command']}) since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"{output} is in use by {who}; wait until it ends, or name another folder."
