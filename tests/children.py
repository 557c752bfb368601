"""Wait for processes that a test cannot wait for itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(happened: Callable[[], bool]) -> None:
    """Return once something has happened."""
    for _ in range(1200):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within two minutes")


def noted(file: Path) -> bool:
    """Whether a process has written its number and a dot into a file."""
    return file.is_file() and file.read_text().endswith(".")


def is_gone(file: Path) -> bool:
    """Whether the process whose number is in a file has ended; nobody may have collected it."""
    try:
        stat = Path("/proc", file.read_text().strip("."), "stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
