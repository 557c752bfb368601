"""The k-th smallest of numbers that never lie together in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# fp32 numbers that are not negative are ordered as their 31 bits are. They are read from the top,
# so many at a time, each time looking only at numbers that begin like the one sought.
_DIGITS = (11, 10, 10)


def _alone(counts_N: Tensor) -> Tensor:
    return counts_N[None]


def smallest(
    pieces: Callable[[], Iterable[Tensor]],
    count: int,
    *,
    gather: Callable[[Tensor], Tensor] = _alone,
    rank: int = 0,
) -> Iterator[Tensor]:
    """Mark the ``count`` smallest numbers of all pieces together; of equal ones the earlier.

    Args:
        pieces: Gives the pieces, the same in each of four passes; fp32, not negative, no NaN.
        count: How many to mark, at most all there are.
        gather: Where several processes hold a part of each piece, in the order of their ranks:
            takes integers (n) of this process and returns those of all, (processes, n). All call
            it equally often.
        rank: Which of them this process is.

    Yields:
        A bool tensor for each piece, True = among the smallest.
    """
    if count == 0:
        for piece in pieces():
            yield torch.zeros_like(piece, dtype=torch.bool)
        return
    limit, ties = _order_statistic(pieces, count, gather)
    for piece in pieces():
        bits = _bits(piece)
        marked, equal = bits < limit, bits == limit
        found_R = gather(equal.count_nonzero()[None])[:, 0]
        if int(found_R.sum()) > ties:
            left = ties - int(found_R[:rank].sum())
            equal &= (equal.flatten().cumsum(0) <= left).view_as(equal)
        ties -= min(int(found_R.sum()), ties)
        yield marked | equal


def _order_statistic(
    pieces: Callable[[], Iterable[Tensor]], count: int, gather: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
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
        total = gather(total).sum(0)
        before = total.cumsum(0)
        found = int(torch.searchsorted(before, count))
        count -= int(before[found] - total[found])
        prefix = prefix << digits | found
        rest -= digits
    return prefix, count


def _bits(piece: Tensor) -> Tensor:
    return piece.contiguous().view(torch.int32)
