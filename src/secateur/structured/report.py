"""The content of a shrunk model's ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import SecateurError
from secateur.report.document import Machine
from secateur.structured.source import Source
from secateur.structured.units import SubBlock, all_units, block_parameters, kept_parameters

SCHEMA = 1


class SubBlockReport(BaseModel):
    """One attention or feed-forward, and why it has the width it has."""

    block: int
    kind: str = Field(description="attention or ffn")
    kept: int = Field(description="key-value groups with their query heads, or channels")
    of: int
    parameters: int = Field(description="that the kept units hold")
    removed_by_round: list[int]
    coefficients: list[float | None] = Field(
        description="by round, the mean of the utility per parameter that regression found in the "
        "units that went: nats per token and parameter, the lower the sooner a unit goes"
    )


class RoundReport(BaseModel):
    """One round."""

    share: float = Field(description="parameters gone after it, of all in the blocks")
    loss: float = Field(description="of the model before it, nats per token on the round's text")
    utility_mean: float = Field(description="mean log-likelihood of its sub-models, finite ones")
    utility_deviation: float = Field(description="their standard deviation")
    not_finite: int = Field(description="sub-models whose log-likelihood was NaN or infinite")
    seconds: float


class ParameterReport(BaseModel):
    """Parameters, counted in the files."""

    model_before: int
    model_after: int
    blocks_before: int
    blocks_after: int
    target: float
    removed: float = Field(description="share of the parameters of all blocks that is gone")


class ShrinkReport(BaseModel):
    """Everything about a finished run."""

    schema_version: int = SCHEMA
    model: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    forward_dtype: str
    parameters: ParameterReport
    sub_blocks: list[SubBlockReport]
    rounds: list[RoundReport]
    forward_tokens: int = Field(description="tokens that went through the model or a sub-model")
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    resumed_rounds: int = Field(description="rounds that an earlier, interrupted session finished")
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    machine: Machine
    notes: list[str]


def describe_sub_blocks(
    sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor], rounds: Sequence[dict[str, Any]]
) -> list[SubBlockReport]:
    """Say what is left of each sub-block, and what the records of the rounds tell about it."""
    return [
        SubBlockReport(
            block=sub_block.block,
            kind=sub_block.kind,
            kept=len(units),
            of=sub_block.units,
            parameters=len(units) * sub_block.unit_parameters,
            removed_by_round=[len(each["removed"][place]) for each in rounds],
            coefficients=[each["coefficients"][place] for each in rounds],
        )
        for place, (sub_block, units) in enumerate(zip(sub_blocks, kept, strict=True))
    ]


def count_parameters(
    source: Source,
    saved: CheckpointReader,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    target: float,
    *,
    padded: bool,
) -> ParameterReport:
    """Count what the files hold and what the kept units hold.

    Raises:
        SecateurError: the two do not agree, though nothing was padded.
    """

    def in_files(reader: CheckpointReader) -> int:
        return sum(torch.Size(shape).numel() for shape in reader.shapes.values())

    total = block_parameters(source.blocks)
    dense = kept_parameters(sub_blocks, all_units(sub_blocks))
    removed = dense - kept_parameters(sub_blocks, kept)
    before, after = in_files(source.reader), in_files(saved)
    if not padded and before - after != removed:
        raise SecateurError(
            f"The saved files hold {before - after} parameters less where {removed} were removed; "
            "please report the model and the options."
        )
    return ParameterReport(
        model_before=before,
        model_after=after,
        blocks_before=total,
        blocks_after=total - removed,
        target=target,
        removed=removed / total,
    )
