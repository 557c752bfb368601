"""Histograms of pruning scores: small enough to keep for every linear of a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Sign and exponent of a float32 and the first six bits of its fraction: floats that are not
# negative are ordered as their bits are, so each bin is 1/64 of its value wide.
DROPPED_BITS = 17
"""Bits of a float32 that its bin does not tell."""
BINS = 1 << (31 - DROPPED_BITS)


def score_histogram(score_OI: Tensor) -> npt.NDArray[np.int32]:
    """Count scores in ``BINS`` bins whose width is a 64th of the score, from 0 to infinity.

    Args:
        score_OI: fp32, not negative, no NaN; any shape.

    Returns:
        int32 (BINS,); the bins' order is that of the scores.
    """
    bins = score_OI.contiguous().view(torch.int32).bitwise_right_shift(DROPPED_BITS)
    counts: npt.NDArray[np.int32] = (
        torch.bincount(bins.flatten(), minlength=BINS).to("cpu", torch.int32).numpy()
    )
    return counts
