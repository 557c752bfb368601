"""The content of a recovery's ``report.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.report.documents.run import RunReport
from secateur.report.documents.training import StepsReport, ValidationReport


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
