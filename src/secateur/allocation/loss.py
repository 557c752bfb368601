"""Zeros go, all over the model, where its final loss feels them least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from secateur.allocation.allocation import BlockCounts, Unequal, by_block
from secateur.allocation.counts import threshold_counts
from secateur.allocation.profile import DenseModel
from secateur.allocation.threshold import ROWS, Rows, block_histograms, fixed_where_blind
from secateur.models.structure import BlockList
from secateur.patterns.plan import Plan


@dataclass(frozen=True)
class _BlockScores:
    """Histograms of one block's linears and the bounds of their zeros."""

    histograms_PB: npt.NDArray[np.int32]
    low: list[int]
    high: list[int]


class Loss(Unequal):
    """Over the whole model, one threshold on what removing a weight does to the loss.

    The score of a weight is g_r · w² · mean(x_i²), with g_r the squared gradient of the
    next-token loss at output row r, summed over tokens: the diagonal of the empirical Fisher
    matrix, taken row by row. Where rows lose equal shares, what counts is its mean over rows at
    the same rank. No block leaves the target by more than ``limit``; the total is
    kept, so where some blocks are held back the threshold moves for the others.
    """

    measures: ClassVar[bool] = True

    method: Literal["loss"] = "loss"
    limit: float = Field(
        0.12, ge=0, lt=1, description="how far a block's sparsity may be from the target"
    )
    sequences: int = Field(16, ge=1, description="calibration sequences to measure on")
    rows: Rows = Field("even", description=ROWS)

    def passes(self, samples: int) -> float:
        return 5.0 * self.sequences / samples

    def allocate(self, plan: Plan, blocks: BlockList, dense: DenseModel | None) -> Plan:
        assert dense is not None
        grouped = by_block(plan, blocks)
        scores: dict[int, _BlockScores] = {}
        for block in dense.blocks_under_loss(self.sequences):
            counts = grouped[block.index]
            histograms_PB, blind = block_histograms(block, self.rows)
            most = self.most_zeros(counts)
            scores[block.index] = _BlockScores(
                histograms_PB, *fixed_where_blind(counts, blind, most)
            )
        ordered = [scores[index] for index in range(len(grouped))]
        bounds = [
            block_bounds(counts, plan.sparsity, self.limit, each.low, each.high)
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
    counts: BlockCounts, target: float, limit: float, low: Sequence[int], high: Sequence[int]
) -> tuple[int, int]:
    """Least and most zeros of a block: ``limit`` around the target, and what its linears allow.

    The block's uniform share always lies within, so that the total can be met.
    """
    weights, uniform = sum(counts.weights), sum(counts.zeros)
    least = max(math.ceil((target - limit) * weights), sum(low))
    most = min(math.floor((target + limit) * weights), sum(high))
    return min(least, uniform), max(most, uniform)
