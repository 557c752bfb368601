"""Means over windows of text, and how far they would move on other windows of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.evaluation.scores import Scores
from secateur.report.documents.evaluation import Difference, Divergence, Figures, Interval
from secateur.runs.errors import SecateurError

RESAMPLES = 10_000
LEVEL = 0.95
# Of fewer windows there are too few different resamples: intervals would be far too narrow.
FEWEST_WINDOWS = 8
# Numbers in one gather of resampled windows.
_NUMBERS = 2**21
# Losses per word above this have no finite perplexity.
_LARGEST_LOSS = 700


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


@dataclass(frozen=True)
class Means:
    """Means over windows, and the same means of resampled windows.

    Attributes:
        mean: loss, and with a dense model its loss, divergence and agreement.
        means_KR: the same rows by resample; None where windows are too few for intervals.
    """

    mean: list[float]
    means_KR: Tensor | None

    @classmethod
    def of(cls, scores: Scores) -> Means:
        """Average and resample the scores of windows."""
        rows = [scores.loss_W]
        if (compared := scores.comparison) is not None:
            rows += [compared.dense_loss_W, compared.divergence_W, compared.agreement_W]
        values_KW = torch.stack(rows)
        enough = values_KW.shape[1] >= FEWEST_WINDOWS
        return cls(values_KW.mean(1).tolist(), resampled_means(values_KW) if enough else None)

    def figures(self, row: int, name: str, weights_dtype: str, tokens_per_word: float) -> Figures:
        """Loss and perplexity of the model in a row."""
        loss = self.mean[row]
        per_word = loss * tokens_per_word
        return Figures(
            model=name,
            weights_dtype=weights_dtype,
            loss=loss,
            perplexity=math.exp(loss),
            interval=self._interval(lambda means_KR: means_KR[row].exp()),
            word_perplexity=math.exp(per_word) if per_word < _LARGEST_LOSS else None,
        )

    def divergence(self) -> Divergence:
        """Distance of the model from the dense one."""
        return Divergence(
            kl=self.mean[2],
            kl_interval=self._interval(lambda means_KR: means_KR[2]),
            top1_agreement=self.mean[3],
        )

    def difference(self) -> Difference:
        """Dense minus model."""
        loss, dense_loss = self.mean[:2]
        return Difference(
            loss=dense_loss - loss,
            loss_interval=self._interval(lambda means_KR: means_KR[1] - means_KR[0]),
            perplexity=math.exp(dense_loss) - math.exp(loss),
            perplexity_interval=self._interval(
                lambda means_KR: means_KR[1].exp() - means_KR[0].exp()
            ),
        )

    def _interval(self, statistic: Callable[[Tensor], Tensor]) -> Interval | None:
        return None if self.means_KR is None else percentile_interval(statistic(self.means_KR))
