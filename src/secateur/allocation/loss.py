"""Loss: zeros where the final loss of the model changes least."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from secateur.allocation.allocation import (
    BlockCounts,
    ByThreshold,
    DensePasses,
    ScoredBlock,
    by_block,
)
from secateur.models.structure import BlockList
from secateur.patterns.plan import Plan
from secateur.solvers.counts import threshold_counts


class Loss(ByThreshold):
    """Over the whole model, one threshold on what removing a weight does to the loss.

    The score of a weight is g_r · w² · mean(x_i²), with g_r the squared gradient of the
    next-token loss at output row r, summed over tokens: the diagonal of the empirical Fisher
    matrix, taken row by row. Where rows lose equal shares, the score of a rank is its mean over
    rows. No block leaves the target by more than ``limit``. The total is kept, so where some
    blocks are held back the threshold moves for the others.
    """

    method: Literal["loss"] = "loss"
    limit: float = Field(
        0.12, ge=0, lt=1, description="how far a block's sparsity may be from the target"
    )
    sequences: int = Field(16, ge=1, le=2**20, description="calibration sequences to measure on")

    def passes(self, samples: int) -> float:
        return 5.0 * self.sequences / samples

    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        assert dense is not None
        grouped = by_block(plan, blocks)
        scores = {
            block.index: self.scored(block, grouped[block.index])
            for block in dense.blocks_under_loss(self.sequences)
        }
        ordered = [scores[index] for index in range(len(grouped))]
        bounds = [
            block_bounds(counts, plan.sparsity, self.limit, each)
            for counts, each in zip(grouped, ordered, strict=True)
        ]
        budgets = threshold_counts(
            np.stack([each.histograms_PB.sum(axis=0, dtype=np.int64) for each in ordered]),
            sum(plan.zeros.values()),
            [low for low, _ in bounds],
            [high for _, high in bounds],
        )
        zeros: dict[str, int] = {}
        for counts, each, budget in zip(grouped, ordered, budgets, strict=True):
            found = threshold_counts(each.histograms_PB, budget, each.low, each.high)
            zeros |= dict(zip(counts.names, found, strict=True))
        return replace(plan, zeros=zeros)


def block_bounds(
    counts: BlockCounts, target: float, limit: float, scored: ScoredBlock
) -> tuple[int, int]:
    """Least and most zeros of a block: ``limit`` around the target, within its linears' bounds.

    The block's uniform share always lies within, so that the total can be met.
    """
    weights, uniform = sum(counts.weights), sum(counts.zeros)
    least = max(math.ceil((target - limit) * weights), sum(scored.low))
    most = min(math.floor((target + limit) * weights), sum(scored.high))
    return min(least, uniform), max(most, uniform)
