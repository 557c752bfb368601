"""Sensitivity: inside each block, zeros where its output changes least."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from secateur.allocation.allocation import ByThreshold, DensePasses, by_block
from secateur.models.structure import BlockList
from secateur.patterns.plan import Plan
from secateur.solvers.counts import threshold_counts


class Sensitivity(ByThreshold):
    """Inside each block, one threshold on what removing a weight does to the block's output.

    The score of a weight is g_r · w² · mean(x_i²). The gradient of <v, y> / |y|, with random signs
    v and y a token of the block's output, is squared and summed over tokens at output row r: that
    is g_r, in expectation the diagonal of the Gauss-Newton matrix of the relative squared error.
    Each block keeps its uniform share of the zeros. Where rows lose equal shares, the score of a
    rank is its mean over rows.
    """

    method: Literal["sensitivity"] = "sensitivity"
    probes: int = Field(
        1, ge=1, le=10_000, description="random sign vectors per batch of sequences"
    )
    sequences: int = Field(16, ge=1, le=2**20, description="calibration sequences to measure on")

    def passes(self, samples: int) -> float:
        return (2.0 + 3.0 * self.probes) * self.sequences / samples

    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        assert dense is not None
        grouped = by_block(plan, blocks)
        zeros: dict[str, int] = {}
        for block in dense.blocks(self.sequences, self.probes):
            counts = grouped[block.index]
            scored = self.scored(block, counts)
            found = threshold_counts(
                scored.histograms_PB, sum(counts.zeros), scored.low, scored.high
            )
            zeros |= dict(zip(counts.names, found, strict=True))
        return replace(plan, zeros=zeros)
