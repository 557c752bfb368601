"""What ``prune`` reports, and what ``estimate`` says of it before."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.run import RunReport


class LinearReport(BaseModel):
    """One linear after pruning."""

    zeros: int = Field(description="zeros, counted in the mask")
    zeros_before: int = Field(0, description="zeros that the dense weights had")
    rounded_to_zero: int = Field(0, description="kept weights that quantisation rounded to zero")
    weights: int
    sparsity: float
    rows: list[int] = Field(
        description="rows by their own sparsity, in ten equal classes from 0 to 1"
    )
    relative_error: float | None = Field(
        description="squared output error over squared output, on held-out tokens"
    )


class LeftLinear(BaseModel):
    """One linear that was left as it was."""

    zeros: int
    weights: int


class BlockReport(BaseModel):
    """One block after pruning."""

    index: int
    held_out_error: float = Field(
        description="error of the block's hidden states against the dense block's on the same "
        "input, direction more than length, mean over held-out tokens"
    )
    linears: dict[str, LinearReport]
    left: dict[str, LeftLinear] = Field(
        default_factory=dict, description="linears left as they were, by only and skip"
    )
    notes: list[str] = Field(description="fallbacks used and updates rejected")
    rejected: dict[str, int] = Field(
        default_factory=dict,
        description="updates that held-out text rejected, by stage: of linears, or 1 for the block",
    )
    seconds: dict[str, float] = Field(description="wall time by phase")


class SparsityReport(BaseModel):
    """Zeros of the linears that were pruned."""

    target: float
    zeros: int
    weights: int
    counted: float = Field(description="zeros over weights, counted in the saved files")
    rounded_to_zero: int = Field(
        0, description="of the zeros, kept weights that quantisation rounded to zero"
    )
    left_dense: int = Field(0, description="linears in the blocks that were left as they were")
    overall: float | None = Field(
        None, description="zeros over weights of all linears, with those left as they were"
    )


class Report(RunReport):
    """Everything about a pruned model."""

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    streamed: bool = Field(description="one block in memory; else the whole model was")
    sparsity: SparsityReport
    blocks: list[BlockReport]
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session finished")


class Needs(BaseModel):
    """Memory of a run."""

    model: str
    peak_memory_bytes: int = Field(description="largest resident size of the process")


class Estimate(Needs):
    """Memory and work of pruning."""

    streamed: bool = Field(description="one block in memory at a time")
    blocks: int
    weights: int = Field(description="weights in the linears that are pruned")
    zeros: int
    left_dense: int = Field(0, description="linears that only and skip leave as they are")
    activation_bytes: int
    activations_in: str = Field(description="memory, or a mapped file")
    forward_flops: float
    statistics_flops: float
    output_bytes: int = Field(description="tensors of the result; masks and headers are small")
