"""Histograms of pruning scores: small enough to keep for every linear of a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.solvers.chunks import row_chunks

# Sign and exponent of a float32 and the first six bits of its fraction: floats that are not
# negative are ordered as their bits are, so each bin is 1/64 of its value wide.
_DROPPED_BITS = 17
"""Bits of a float32 that its bin does not tell."""
BINS = 1 << (31 - _DROPPED_BITS)


def score_histogram(score_OI: Tensor) -> npt.NDArray[np.int32]:
    """Count scores in ``BINS`` bins whose width is a 64th of the score, from 0 to infinity.

    Args:
        score_OI: fp32, not negative, no NaN; any shape.

    Returns:
        int32 (BINS,); the bins' order is that of the scores.
    """
    bins = score_OI.contiguous().view(torch.int32).bitwise_right_shift(_DROPPED_BITS)
    counts: npt.NDArray[np.int32] = (
        torch.bincount(bins.flatten(), minlength=BINS).to("cpu", torch.int32).numpy()
    )
    return counts


def rank_histogram(score_OI: Tensor) -> npt.NDArray[np.int32]:
    """As ``score_histogram``, for a linear each of whose rows will lose the same share.

    Such a linear gives up its weights a rank at a time: the lowest of every row, then the second
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
