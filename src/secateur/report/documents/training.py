"""What ``train`` and ``recover`` report."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.prune import Report, SparsityReport
from secateur.report.documents.run import RunReport


class ValidationReport(BaseModel):
    """Mean negative log-likelihood of held-out windows, nats per token."""

    windows: int
    length: int = Field(description="tokens per window")
    dense: float | None = Field(description="of the teacher; null without one")
    before: float = Field(description="of the model that came in, with its first masks if any")
    after: float = Field(description="of the weights in the file, low-rank products included")


class StepsReport(BaseModel):
    """Steps on the network as a whole."""

    steps: int
    tokens: int
    curve: list[dict[str, float]] = Field(
        description="up to a hundred steps of the log, the last one included"
    )
    validations: list[dict[str, float]] = Field(description="held-out loss by step")
    resumed_steps: int = Field(description="steps that an earlier, interrupted session did")


class LowRankReport(BaseModel):
    """Dense parameters beside the sparse linears."""

    folder: str = Field(description="inside the output, a LoRA adapter in PEFT's format")
    parameters: int
    share: float = Field(description="of the weights in the linears they stand beside")


class TrainingReport(RunReport, StepsReport):
    """Everything about a finished training run."""

    teacher: str | None
    options: dict[str, Any]
    start: Report | None = Field(
        description="the report of the pruning that came first; null if there was none"
    )
    text: dict[str, Any]
    sparsity: SparsityReport
    low_rank: LowRankReport | None
    validation: ValidationReport


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


class NetworkReport(StepsReport):
    """Training of the network as a whole."""

    adapters: AdaptersReport | None
    chosen_step: int = Field(description="whose weights had the lowest held-out loss; 0 for none")
    loss: float = Field(description="held out, of the weights in the file")


class RecoveryValidation(ValidationReport):
    """The same, with the loss between both steps of recovery."""

    dense: float
    after_blocks: float | None = Field(description="null where blocks were not fitted")


class RecoveryReport(RunReport):
    """Everything about a finished recovery."""

    teacher: str
    options: dict[str, Any]
    text: dict[str, Any]
    blocks: list[FittedBlockReport]
    network: NetworkReport | None
    validation: RecoveryValidation
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session fitted")
