"""The content of ``report.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.runs.machine import Machine

SCHEMA = 1


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


class Report(BaseModel):
    """Everything about a finished run."""

    schema_version: int = SCHEMA
    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    forward_dtype: str
    streamed: bool = Field(description="one block in memory; else the whole model was")
    sparsity: SparsityReport
    blocks: list[BlockReport]
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session finished")
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    machine: Machine
    notes: list[str]
