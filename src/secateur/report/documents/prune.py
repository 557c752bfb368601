"""What ``prune`` reports, and what ``estimate`` says of it before."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.run import RunReport


class LinearReport(BaseModel):
    """One linear after pruning."""

    zeros: int = Field(description="zeros, counted in the mask")
    rounded_to_zero: int = Field(0, description="kept weights that quantisation rounded to zero")
    weights: int
    sparsity: float
    rows: list[int] = Field(
        description="rows by their own sparsity, in ten equal classes from 0 to 1"
    )
    relative_error: float | None = Field(
        description="squared output error over squared output, on held-out tokens"
    )


class BlockReport(BaseModel):
    """One block after pruning."""

    index: int
    held_out_error: float = Field(
        description="error of the block's hidden states against the dense block's on the same "
        "input, direction more than length, mean over held-out tokens"
    )
    linears: dict[str, LinearReport]
    notes: list[str] = Field(description="fallbacks used and updates rejected")
    seconds: dict[str, float] = Field(description="wall time by phase")


class SparsityReport(BaseModel):
    """Zeros of the linears in all blocks."""

    target: float
    zeros: int
    weights: int
    counted: float = Field(description="zeros over weights, counted in the saved files")
    rounded_to_zero: int = Field(
        0, description="of the zeros, kept weights that quantisation rounded to zero"
    )


class Report(RunReport):
    """Everything about a pruned model."""

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    streamed: bool = Field(description="one block in memory; else the whole model was")
    sparsity: SparsityReport
    blocks: list[BlockReport]
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session finished")


class Estimate(BaseModel):
    """Memory and work of a run."""

    model: str
    streamed: bool = Field(description="one block in memory at a time")
    blocks: int
    weights: int = Field(description="weights in the linears of all blocks")
    zeros: int
    peak_memory_bytes: int
    activation_bytes: int
    activations_in: str = Field(description="memory, or a mapped file")
    forward_flops: float
    statistics_flops: float
    output_bytes: int = Field(description="tensors of the result; masks and headers are small")
