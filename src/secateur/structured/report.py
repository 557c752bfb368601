"""The content of a shrunk model's ``report.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.document import Machine

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
    utility_mean: float | None = Field(
        description="mean log-likelihood of its sub-models, finite ones"
    )
    utility_deviation: float | None = Field(description="their standard deviation")
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
