"""What the reports of all runs hold."""

from __future__ import annotations

from pydantic import BaseModel, Field

from secateur.models.origin import Origin
from secateur.runs.machine import Machine


class Document(BaseModel):
    """A finished piece of work on a model: with what, where, and how much memory it took."""

    schema_version: int = 1
    model: str
    forward_dtype: str
    peak_memory_bytes: int
    machine: Machine
    notes: list[str]


class RunReport(Document):
    """A finished run."""

    origin: Origin = Field(
        default_factory=Origin, description="what the model's own card says of it"
    )
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    peak_device_memory_bytes: int | None
