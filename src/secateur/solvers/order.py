"""The k-th smallest of numbers that never lie together in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# fp32 numbers that are not negative are ordered as their 31 bits are. They are read from the top,
# so many at a time, each time looking only at numbers that begin like the one sought.
_DIGITS = (11, 10, 10)


def smallest(pieces: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """Mark the ``count`` smallest numbers of all pieces together; of equal ones the earlier.

    Args:
        pieces: Gives the pieces, the same in each of four passes; fp32, not negative, no NaN.
        count: How many to mark, at most all there are.

    Yields:
        A bool tensor for each piece, True = among the smallest.
    """
    if count == 0:
        for piece in pieces():
            yield torch.zeros_like(piece, dtype=torch.bool)
        return
    limit, ties = _order_statistic(pieces, count)
    for piece in pieces():
        bits = _bits(piece)
        marked, equal = bits < limit, bits == limit
        found = int(equal.count_nonzero())
        if found > ties:
            equal &= (equal.flatten().cumsum(0) <= ties).view_as(equal)
        ties -= min(found, ties)
        yield marked | equal


def _order_statistic(pieces: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int]:
    """Bits of the ``count``-th smallest number, and how many equal to it are still to be taken."""
    prefix, rest = 0, sum(_DIGITS)
    for digits in _DIGITS:
        total: Tensor | None = None
        for piece in pieces():
            bits = _bits(piece).flatten()
            if rest < sum(_DIGITS):
                bits = bits[bits >> rest == prefix]
            digit = (bits >> (rest - digits)) & ((1 << digits) - 1)
            counts = torch.bincount(digit, minlength=1 << digits)
            total = counts if total is None else total + counts
        assert total is not None, "there are numbers to choose from"
        before = total.cumsum(0)
        found = int(torch.searchsorted(before, count))
        count -= int(before[found] - total[found])
        prefix = prefix << digits | found
        rest -= digits
    return prefix, count


def _bits(piece: Tensor) -> Tensor:
    return piece.contiguous().view(torch.int32)
