"""What a comparison ends with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

# Neither torch nor what needs it is imported here; secateur.runs.processes says why.


class Cost(BaseModel):
    """What one run of a row took."""

    model_config = ConfigDict(frozen=True)

    seconds: float = Field(description="wall time of the whole process")
    cpu_seconds: float
    peak_bytes: int = Field(description="largest resident size of the process")
    resumed: bool = Field(
        False, description="an earlier process had been stopped; the cost is that of the last one"
    )


class Spread(BaseModel):
    """A figure over all runs of a row."""

    model_config = ConfigDict(frozen=True)

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The three of some values."""
        return cls(minimum=min(values), median=statistics.median(values), maximum=max(values))


class Pruned(BaseModel):
    """What making a row's checkpoint cost, and what it is."""

    model_config = ConfigDict(frozen=True)

    sparsity: float | None = Field(
        description="zeros over weights of the blocks' linears, in the files; null if they are "
        "stored in a way that `secateur inspect` does not read"
    )
    weights: int | None = Field(None, description="of those linears")
    runs: tuple[Cost, ...] = Field(min_length=1, description="each on its own, in their order")
    peak_device_bytes: int | None = Field(description="largest memory allocated on the GPU")
    size_bytes: int = Field(description="of the safetensors files")

    @computed_field(description="wall time over all runs")  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> Spread:
        """Wall time over all runs."""
        return Spread.of([run.seconds for run in self.runs])

    @computed_field(description="processor time over all runs")  # type: ignore[prop-decorator]
    @property
    def cpu_seconds(self) -> Spread:
        """Processor time over all runs."""
        return Spread.of([run.cpu_seconds for run in self.runs])

    @property
    def peak_bytes(self) -> int:
        """The largest of all runs."""
        return max(run.peak_bytes for run in self.runs)

    @property
    def resumed(self) -> bool:
        """Whether a run had been interrupted."""
        return any(run.resumed for run in self.runs)

    @model_validator(mode="before")
    @classmethod
    def _read_first_schema(cls, values: Any) -> Any:
        if isinstance(values, dict) and "runs" not in values and "seconds" in values:
            return {**values, "runs": [{name: values[name] for name in Cost.model_fields}]}
        return values


class Row(BaseModel):
    """One model of the table."""

    model_config = ConfigDict(frozen=True)

    name: str
    command: str | None = Field(
        "prune", description="of ours, or the words of a script; null for the dense model"
    )
    start: str | None = Field(None, description="the row whose checkpoint it worked on")
    recipe: str | None = Field(description="the command's options, complete, as YAML")
    pruned: Pruned | None = Field(description="null for the dense model")
    size_bytes: int = Field(description="of the safetensors files")
    evaluation: dict[str, Any] = Field(description="what `secateur eval --json` prints")
    folder: str = Field(description="where the row's files are, below the output")
    yardstick: str | None = Field(None, description="the row that its time is divided by")


class ComparisonResult(BaseModel):
    """The content of ``comparison.json``."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 2
    options: dict[str, Any] = Field(description="the comparison file without its rows")
    weights: int | None = Field(None, description="of the dense model's linears in its blocks")
    rows: list[Row]
    machine: dict[str, Any]
