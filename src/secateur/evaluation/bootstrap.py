"""How far figures would move on other windows of the same text."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.runs.errors import SecateurError

RESAMPLES = 10_000
LEVEL = 0.95
# Numbers in one gather of resampled windows.
_NUMBERS = 2**21


def resampled_means(values_KW: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means over windows drawn with replacement (Efron and Tibshirani 1993, chapters 6 and 13).

    Every row is averaged over the same drawn windows, so that a difference or a ratio of two rows
    of the result is that of a paired bootstrap.

    Args:
        values_KW: quantities by window (quantities, windows).
        resamples: how often as many windows as there are are drawn.
        seed: decides the draws.

    Returns:
        float64 (quantities, resamples), on the CPU.
    """
    if resamples < 1:
        raise SecateurError(f"{resamples} resamples give no interval; use 1 or more.")
    values_KW = values_KW.double().cpu()
    kinds, windows = values_KW.shape
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _NUMBERS // (kinds * windows))
    means = [
        values_KW[
            :, torch.randint(windows, (min(step, resamples - at), windows), generator=generator)
        ].mean(-1)
        for at in range(0, resamples, step)
    ]
    return torch.cat(means, dim=1)


def percentile_interval(statistic_R: Tensor, level: float = LEVEL) -> tuple[float, float]:
    """The middle of a resampled statistic that holds the given share of it."""
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=statistic_R.dtype)
    low, high = statistic_R.quantile(ends).tolist()
    return low, high
