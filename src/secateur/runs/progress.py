"""How long work tells that it is alive."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, the steps done in it and the steps in all."""


def silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""
