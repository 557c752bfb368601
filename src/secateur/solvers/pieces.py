"""Work on numbers of which only a few lie in memory, or in a cache, at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# Weights handled at a time where 20 bytes each are needed: they stay in a core's cache, or keep
# an accelerator busy.
_CHUNK_CPU = 2**17
_CHUNK_ACCELERATOR = 2**22
# fp32 numbers that are not negative are ordered as their 31 bits are. These are the numbers of
# bits, from the top, that one pass tells apart.
_DIGITS = (11, 10, 10)


def row_chunks(like_OI: Tensor, fewest: int = 1) -> Iterator[slice]:
    """Cut the rows of a matrix into pieces of a size that suits its device.

    Args:
        like_OI: The matrix.
        fewest: Rows that a piece has at least, the last one aside.
    """
    weights = _CHUNK_CPU if like_OI.device.type == "cpu" else _CHUNK_ACCELERATOR
    rows, columns = like_OI.shape
    step = max(fewest, weights // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def smallest(
    pieces: Callable[[], Iterable[Tensor]],
    count: int,
    *,
    gather: Callable[[Tensor], Tensor] = lambda counts_N: counts_N[None],
    rank: int = 0,
) -> Iterator[Tensor]:
    """Mark the ``count`` smallest numbers of all pieces together; of equal ones the earlier.

    Args:
        pieces: Gives the pieces, the same in each of four passes; fp32, not negative, no NaN.
        count: How many to mark, at most all there are.
        gather: Where several processes hold a part of each piece, in the order of their ranks:
            takes integers (n) of this process and returns those of all, (processes, n). All call
            it equally often.
        rank: Number of this process.

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
    """Bits of the ``count``-th smallest number, and how many of its equals are to be marked."""
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
