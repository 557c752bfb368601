"""DLP: blocks whose median score is small are the important ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from secateur.allocation.allocation import DensePasses, PerBlock, opposed


class DLP(PerBlock):
    """More sparsity where the median score of a block is large."""

    measures: ClassVar[bool] = True

    method: Literal["dlp"] = "dlp"
    limit: float = Field(0.15, ge=0, lt=1, description="half the distance of the extreme blocks")
    sequences: int = Field(16, ge=1, le=2**20, description="calibration sequences to measure on")

    def passes(self, samples: int) -> float:
        return 2.0 * self.sequences / samples

    def block_sparsities(self, target: float, count: int, dense: DensePasses | None) -> list[float]:
        assert dense is not None
        medians = [
            sum(float(score.median()) for _, score in block.scores())
            for block in dense.blocks(self.sequences)
            if block.linears
        ]
        return dlp_sparsities(target, medians, self.limit)


def dlp_sparsities(target: float, medians: Sequence[float], limit: float) -> list[float]:
    """Block sparsities from summed medians S of Wanda scores.

    DLP (Chen et al. 2025, arXiv 2505.23807): importance 1 - S / ΣS, rescaled to [0, 2 limit],
    is taken from the target and the mean given back.
    """
    total = sum(medians)
    importance = [1 - median / total if total else 1.0 for median in medians]
    return opposed(target, importance, limit)
