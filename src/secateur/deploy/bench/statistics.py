"""What repeated measurements say, without assuming a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

CONFIDENCE = 0.95


def pairwise_ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times shorter each time is than that of the base in the same turn."""
    return [first / second for first, second in zip(base, other, strict=True)]


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """The median, and the interval between two of the values that holds the true one.

    Of ``n`` values from any continuous distribution, the true median lies between the ``k``-th
    smallest and the ``k``-th largest with probability 1 - 2 P(B < k), B binomial with n and 1/2.
    The largest such ``k`` is taken; the range if even that is less sure, as with five values, of
    which it is 94 %.

    Args:
        values: at least one.
        confidence: the least probability.

    Returns:
        The median, the lower and the upper end.
    """
    ordered = sorted(values)
    outside = 0
    place = 0
    for below in range((len(ordered) - 1) // 2 + 1):
        outside += comb(len(ordered), below)
        # Coverage of the interval that leaves `below` + 1 values out at the most.
        if 2 * outside > (1 - confidence) * 2 ** len(ordered):
            break
        place = below
    return median(ordered), ordered[place], ordered[len(ordered) - 1 - place]


def relative_width(values: Sequence[float]) -> float:
    """Half of the interval over the median."""
    middle, low, high = median_interval(values)
    return (high - low) / 2 / middle
