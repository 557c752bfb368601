"""The content of a recovery's ``report.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.prune import SCHEMA
from secateur.runs.machine import Machine


class FittedBlockReport(BaseModel):
    """A block's squared distance from the dense model's hidden states, over the larger square."""

    index: int
    before: float = Field(description="behind the fitted blocks, with the weights it had")
    after: float
    notes: list[str]


class AdaptersReport(BaseModel):
    """Low-rank adapters, which are merged into the weights."""

    rank: int
    parameters: int


class NetworkReport(BaseModel):
    """Training of the network as a whole."""

    adapters: AdaptersReport | None
    steps: int
    tokens: int
    chosen_step: int = Field(description="whose weights had the lowest held-out loss; 0 for none")
    loss: float = Field(description="held out, of the weights in the file")
    curve: list[dict[str, float]] = Field(
        description="up to a hundred steps of the log, the last one included"
    )
    validations: list[dict[str, float]] = Field(description="held-out loss by step")
    resumed_steps: int = Field(description="steps that an earlier, interrupted session did")


class RecoveryValidation(BaseModel):
    """Mean negative log-likelihood of held-out windows, nats per token."""

    windows: int
    length: int = Field(description="tokens per window")
    dense: float = Field(description="of the teacher")
    before: float
    after_blocks: float | None = Field(description="null where blocks were not fitted")
    after: float = Field(description="of the weights in the file")


class RecoveryReport(BaseModel):
    """Everything about a finished recovery."""

    schema_version: int = SCHEMA
    model: str
    teacher: str
    options: dict[str, Any]
    text: dict[str, Any]
    forward_dtype: str
    blocks: list[FittedBlockReport]
    network: NetworkReport | None
    validation: RecoveryValidation
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session fitted")
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    machine: Machine
    notes: list[str]
