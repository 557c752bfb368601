"""From wanted shares, or from scores under one threshold, to exact integer counts within bounds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.patterns.pattern import proportional_counts
from secateur.runs.errors import SecateurError
from secateur.solvers.pieces import row_chunks

Counts = npt.NDArray[np.int64]
Histogram = npt.NDArray[np.int32]

# Floats that are not negative are ordered as their bits are. A bin is their sign, exponent and the
# first six bits of their fraction, so it is 1/64 of its value wide; the other bits are dropped.
_DROPPED_BITS = 17
BINS = 1 << (31 - _DROPPED_BITS)


def bounded_counts(
    wanted: Sequence[float],
    sizes: Sequence[int],
    total: int,
    low: Sequence[int],
    high: Sequence[int],
) -> list[int]:
    """Integers that add up to ``total``, as near to what is wanted as bounds allow.

    All sparsities are shifted by one and the same amount t, and part p gets
    clip(wanted + t · size, low, high), rounded: the projection of the wanted sparsities onto the
    budget, in the norm that weighs each part with its size.

    Args:
        wanted: zeros wanted of each part, not necessarily whole or within bounds.
        sizes: weights of each part, positive.
        total: zeros to give out.
        low: least zeros of each part.
        high: most zeros of each part.

    Raises:
        SecateurError: no counts within the bounds add up to the total.
    """
    want, size = np.asarray(wanted, np.float64), np.asarray(sizes, np.float64)
    least, most = np.asarray(low, np.int64), np.asarray(high, np.int64)

    def at(shift: float) -> Counts:
        return np.clip(np.floor(want + shift * size), least, most).astype(np.int64)

    _require_reachable(total, least, most)
    below, above = (
        float(np.min((least - want) / size)) - 1,
        float(np.max((most - want) / size)) + 1,
    )
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if at(middle).sum() <= total else (below, middle)
    return _between(at(below), at(above), total)


def score_histogram(score_OI: Tensor) -> Histogram:
    """Count scores in ``BINS`` bins whose width is a 64th of the score, from 0 to infinity.

    Args:
        score_OI: fp32, not negative, no NaN; any shape.
    """
    bins = score_OI.contiguous().view(torch.int32).bitwise_right_shift(_DROPPED_BITS)
    counts: Histogram = torch.bincount(bins.flatten(), minlength=BINS).cpu().int().numpy()
    return counts


def rank_histogram(score_OI: Tensor) -> Histogram:
    """As ``score_histogram``, for a linear each of whose rows will lose the same share.

    Such a linear loses its weights a rank at a time: the lowest of every row, then the second
    lowest. Every weight of a rank counts with the root of the mean square of them all, since the
    squares are costs and add up.

    Args:
        score_OI: fp32 (out, in), not negative, no NaN.
    """
    sum_I = torch.zeros(score_OI.shape[1], dtype=torch.float64, device=score_OI.device)
    for rows in row_chunks(score_OI):
        sum_I += score_OI[rows].sort(dim=1).values.double().square().sum(dim=0)
    rank_I = (sum_I / score_OI.shape[0]).sqrt().float()
    return score_histogram(rank_I) * np.int32(score_OI.shape[0])


def threshold_counts(
    histograms_PB: npt.NDArray[np.integer], total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """How many scores of each part lie under one threshold common to all parts.

    At the threshold the counts, each kept within its bounds, add up to ``total``. Within the bin
    it falls into, what is missing is shared in proportion.

    Args:
        histograms_PB: scores of each part, counted in the bins of ``score_histogram``.
        total: zeros to give out.
        low: least zeros of each part.
        high: most zeros of each part.

    Raises:
        SecateurError: no counts within the bounds add up to the total.
    """
    least, most = np.asarray(low, np.int64), np.asarray(high, np.int64)

    def at(bins: int) -> Counts:
        under_P = histograms_PB[:, :bins].sum(axis=1, dtype=np.int64)
        counts: Counts = np.clip(under_P, least, most)
        return counts

    _require_reachable(total, least, most)
    end = histograms_PB.shape[1]
    below = bisect_right(range(end + 1), total, key=lambda bins: int(at(bins).sum())) - 1
    return _between(at(below), at(min(below + 1, end)), total)


def _between(below: Counts, above: Counts, total: int) -> list[int]:
    """Fill up from ``below`` towards ``above`` until the counts add up to ``total``."""
    missing = total - int(below.sum())
    more = proportional_counts(missing, (above - below).tolist())
    return [int(count) + extra for count, extra in zip(below, more, strict=True)]


def _require_reachable(total: int, low: Counts, high: Counts) -> None:
    if not int(low.sum()) <= total <= int(high.sum()) or bool((low > high).any()):
        raise SecateurError(
            f"{total} zeros cannot be divided so that every part keeps its bounds, which leave "
            f"room for {int(low.sum())} to {int(high.sum())}; choose another sparsity or wider "
            "bounds."
        )
