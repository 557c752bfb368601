"""How much is held at a time, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOGITS = 2**24
"""Those that exist at one time. As much memory as this goes back to the system when it is freed;
of pieces up to 32 MB glibc keeps what is between them, which came to half a gigabyte."""

# Above one in a trial on a small model, whose limits have to be as small.
_divisor: ContextVar[int] = ContextVar("divisor", default=1)


def tokens_at_once(most: int) -> int:
    """So many tokens; in a trial as many as keep the proportion."""
    return max(1, most // _divisor.get())


def rows_at_once(numbers: int, width: int) -> int:
    """Rows of a width that hold at most so many numbers; in a trial, as many as in the real run."""
    return max(1, numbers // _divisor.get() ** 2 // width)


@contextmanager
def sizes_divided_by(divisor: int) -> Iterator[None]:
    """Within the context all sizes are those of a real run, divided."""
    token = _divisor.set(divisor)
    try:
        yield
    finally:
        _divisor.reset(token)
