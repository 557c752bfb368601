"""From wanted shares, or from score histograms, to exact integer counts within bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from secateur.patterns.pattern import proportional_counts
from secateur.runs.errors import SecateurError

Counts = npt.NDArray[np.int64]


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


def threshold_counts(
    histograms_PB: npt.NDArray[np.int32], total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """How many scores of each part lie under one threshold common to all parts.

    The threshold is the one at which the counts, each kept within its bounds, add up to
    ``total``. Within the bin it falls into, what is missing is shared in proportion.

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
    below = _last(lambda bins: int(at(bins).sum()) <= total, histograms_PB.shape[1])
    return _between(at(below), at(min(below + 1, histograms_PB.shape[1])), total)


def _last(holds: Callable[[int], bool], end: int) -> int:
    """The largest of 0 ... end for which a condition holds that holds for 0."""
    first, last = 0, end
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if holds(middle) else (first, middle - 1)
    return first


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
