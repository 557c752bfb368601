"""Zeros go, inside each block, where its output feels them least."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from secateur.allocation.allocation import Unequal, by_block
from secateur.allocation.counts import threshold_counts
from secateur.allocation.profile import DenseModel
from secateur.allocation.threshold import ROWS, Rows, block_histograms, fixed_where_blind
from secateur.models.structure import BlockList
from secateur.patterns.plan import Plan


class Sensitivity(Unequal):
    """Inside each block, one threshold on what removing a weight does to the block's output.

    The score of a weight is g_r · w² · mean(x_i²). The gradient of <v, y> / |y|, with random signs
    v and y a token of the block's output, is squared and summed over tokens at output row r: that
    is g_r, in expectation the diagonal of the Gauss-Newton matrix of the relative squared error.
    Each block keeps its uniform share of the zeros. Where rows lose equal shares, what counts is
    the mean over rows of the score at the same rank.
    """

    measures: ClassVar[bool] = True

    method: Literal["sensitivity"] = "sensitivity"
    probes: int = Field(1, ge=1, description="random sign vectors per batch of sequences")
    sequences: int = Field(16, ge=1, description="calibration sequences to measure on")
    rows: Rows = Field("even", description=ROWS)

    def passes(self, samples: int) -> float:
        return (2.0 + 3.0 * self.probes) * self.sequences / samples

    def allocate(self, plan: Plan, blocks: BlockList, dense: DenseModel | None) -> Plan:
        assert dense is not None
        grouped = by_block(plan, blocks)
        zeros: dict[str, int] = {}
        for block in dense.blocks(self.sequences, self.probes):
            counts = grouped[block.index]
            histograms_PB, blind = block_histograms(block, self.rows)
            low, high = fixed_where_blind(counts, blind, self.most_zeros(counts))
            found = threshold_counts(histograms_PB, sum(counts.zeros), low, high)
            zeros |= dict(zip(counts.names, found, strict=True))
        return replace(plan, zeros=zeros)
