"""Masks of all linears by one threshold, so that zeros move between linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from secateur.allocation.histogram import BINS, DROPPED_BITS, score_histogram
from secateur.pattern import refuse_nan

Score = Callable[[], Tensor]


def keep_highest_together(scores: Sequence[Score], zeros: int) -> Iterator[Tensor]:
    """Keep the highest scores of a whole model, with an exact number of zeros.

    The projection of ELSA (arXiv 2510.01650). Scores of a model never meet: two histograms of
    their bits give the threshold, so each linear is scored three times and none is sorted. Of
    equal scores those of earlier linears and positions go first.

    Args:
        scores: for each linear a function that makes its scores, fp32, not negative; each has to
            return the same again, and is last called before its mask is taken.
        zeros: of all masks together, fewer than there are scores.

    Yields:
        The mask of each linear in turn, True = kept.

    Raises:
        SecateurError: a score is NaN.
    """
    threshold, ties = _threshold(scores, zeros)
    for score in scores:
        bits = _bits(score())
        mask = bits >= threshold
        if ties:
            equal = (bits == threshold).flatten()
            first = equal & (equal.cumsum(0) <= ties)
            mask &= ~first.view_as(mask)
            ties -= int(first.count_nonzero())
        yield mask


def _threshold(scores: Sequence[Score], zeros: int) -> tuple[int, int]:
    """Bits of the lowest score that may stay, and how many scores of that value have to go."""
    coarse = torch.zeros(BINS, dtype=torch.int64)
    for score in scores:
        score_OI = score()
        refuse_nan(score_OI)
        coarse += torch.from_numpy(score_histogram(score_OI))
    # The bin in which the first score that stays lies.
    bin_, below = _place(coarse, zeros)
    fine = torch.zeros(1 << DROPPED_BITS, dtype=torch.int64)
    for score in scores:
        bits = _bits(score())
        within = bits[bits.bitwise_right_shift(DROPPED_BITS) == bin_]
        within = within.bitwise_and(len(fine) - 1)
        fine += torch.bincount(within, minlength=len(fine)).cpu()
    rest, below_within = _place(fine, zeros - below)
    return (bin_ << DROPPED_BITS) + rest, zeros - below - below_within


def _place(counts: Tensor, zeros: int) -> tuple[int, int]:
    """The first bin that is not removed whole, and what the bins before it hold."""
    total = counts.cumsum(0)
    index = int(torch.searchsorted(total, zeros, right=True))
    return index, int(total[index - 1]) if index else 0


def _bits(score_OI: Tensor) -> Tensor:
    """Floats that are not negative are ordered as these integers are."""
    return score_OI.contiguous().view(torch.int32)
