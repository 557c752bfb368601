"""A ramp over depth: errors of early blocks go through all the others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.allocation.allocation import DensePasses, PerBlock


class Ramp(PerBlock):
    """Sparsity that rises evenly with depth."""

    method: Literal["ramp"] = "ramp"
    rise: float = Field(
        0.2, gt=-1, lt=1, description="sparsity of the last block minus that of the first"
    )

    def block_sparsities(self, target: float, count: int, dense: DensePasses | None) -> list[float]:
        return ramp_sparsities(target, count, self.rise)


def ramp_sparsities(target: float, count: int, rise: float) -> list[float]:
    """An arithmetic progression over depth with the target as its mean.

    ATP (Huang et al. 2025, arXiv 2502.14770) with the common difference rise / (count - 1).

    Args:
        target: mean sparsity.
        count: number of blocks.
        rise: sparsity of the last block minus that of the first.
    """
    if count == 1:
        return [target]
    return [target + rise * (index / (count - 1) - 0.5) for index in range(count)]
