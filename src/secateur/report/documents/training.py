"""The content of a training run's ``report.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.prune import SCHEMA, Report, SparsityReport
from secateur.runs.machine import Machine


class ValidationReport(BaseModel):
    """Mean negative log-likelihood of held-out windows, nats per token."""

    windows: int
    length: int = Field(description="tokens per window")
    dense: float | None = Field(description="of the teacher; null without one")
    before: float = Field(description="with the first masks")
    after: float = Field(description="of the weights in the file, low-rank products included")


class LowRankReport(BaseModel):
    """Dense parameters beside the sparse linears."""

    folder: str = Field(description="inside the output, a LoRA adapter in PEFT's format")
    parameters: int
    share: float = Field(description="of the weights in the linears they stand beside")


class TrainingReport(BaseModel):
    """Everything about a finished training run."""

    schema_version: int = SCHEMA
    model: str
    teacher: str | None
    options: dict[str, Any]
    start: Report | None = Field(
        description="the report of the pruning that came first; null if there was none"
    )
    text: dict[str, Any]
    forward_dtype: str
    sparsity: SparsityReport
    low_rank: LowRankReport | None
    steps: int
    tokens: int
    validation: ValidationReport
    curve: list[dict[str, float]] = Field(
        description="up to a hundred steps of the log, the last one included"
    )
    validations: list[dict[str, float]] = Field(description="held-out loss by step")
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    resumed_steps: int = Field(description="steps that an earlier, interrupted session did")
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    machine: Machine
    notes: list[str]
