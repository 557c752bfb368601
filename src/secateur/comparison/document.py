"""What a comparison ends with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Neither torch nor what needs it is imported here; secateur.runs.processes says why.


class Pruned(BaseModel):
    """What making a row's checkpoint cost, and what it is."""

    model_config = ConfigDict(frozen=True)

    sparsity: float = Field(description="zeros over weights of the blocks' linears, in the files")
    seconds: float = Field(description="wall time of the whole process")
    cpu_seconds: float
    peak_bytes: int = Field(description="largest resident size of the process")
    peak_device_bytes: int | None = Field(description="largest memory allocated on the GPU")
    resumed: bool = Field(
        description="an earlier process had been stopped; the cost is that of the last one"
    )
    size_bytes: int = Field(description="of the safetensors files")


class Row(BaseModel):
    """One model of the table."""

    model_config = ConfigDict(frozen=True)

    name: str
    recipe: str | None = Field(description="complete, as YAML; null for the dense model")
    pruned: Pruned | None = Field(description="null for the dense model")
    size_bytes: int = Field(description="of the safetensors files")
    evaluation: dict[str, Any] = Field(description="what `secateur eval --json` prints")
    folder: str = Field(description="where the row's files are, below the output")


class ComparisonResult(BaseModel):
    """The content of ``comparison.json``."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    options: dict[str, Any] = Field(description="the comparison file without its rows")
    rows: list[Row]
    machine: dict[str, Any]
