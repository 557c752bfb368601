"""Pruning scores that need no solve."""

from __future__ import annotations

from torch import Tensor


def magnitude_score(w_OI: Tensor) -> Tensor:
    """|W|, the change of a weight that is set to zero."""
    return w_OI.abs()


def wanda_score(w_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """|W| times the root mean square of its input (Sun et al. 2023, arXiv 2306.11695, eq. 1).

    Args:
        w_OI: Weights.
        mean_square_I: Mean square of each input over calibration tokens, the Gram matrix's
            diagonal.

    Returns:
        score_OI.
    """
    return w_OI.abs().mul_(mean_square_I.clamp_min(0).sqrt())
