"""OWL: blocks with more outliers among their scores keep more weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from secateur.allocation.allocation import DensePasses, PerBlock, opposed


class OWL(PerBlock):
    """Less sparsity where more weights stand out of their block."""

    measures: ClassVar[bool] = True

    method: Literal["owl"] = "owl"
    outlier: float = Field(
        5.0, gt=0, le=1e6, description="a score this many times the block's mean is an outlier"
    )
    limit: float = Field(0.08, ge=0, lt=1, description="half the distance of the extreme blocks")
    sequences: int = Field(16, ge=1, le=2**20, description="calibration sequences to measure on")

    def passes(self, samples: int) -> float:
        return 2.0 * self.sequences / samples

    def block_sparsities(self, target: float, count: int, dense: DensePasses | None) -> list[float]:
        assert dense is not None
        shares = [
            outlier_share([score for _, score in block.scores()], self.outlier)
            for block in dense.blocks(self.sequences)
            if block.linears
        ]
        return owl_sparsities(target, shares, self.limit)


def outlier_share(scores: Sequence[Tensor], outlier: float) -> float:
    """Share of all scores of a block that exceed ``outlier`` times their common mean.

    OWL (Yin et al. 2024, arXiv 2310.05175), the layerwise outlier distribution.
    """
    count = sum(score.numel() for score in scores)
    if not count:
        return 0.0
    mean = sum(float(score.double().mean()) * score.numel() for score in scores) / count
    return sum(int((score > outlier * mean).sum()) for score in scores) / count


def owl_sparsities(target: float, shares: Sequence[float], limit: float) -> list[float]:
    """Block sparsities from outlier shares D: s - (d - mean d), d = D rescaled to [0, 2 limit].

    OWL (Yin et al. 2024, arXiv 2310.05175): sparsity falls with the share of outliers and
    stays within 2 limit of the largest.
    """
    return opposed(target, shares, limit)
