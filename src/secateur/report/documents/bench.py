"""What a measurement of speed and memory ends with."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from secateur.runs.machine import Machine


class BenchProtocol(BaseModel):
    """How models were measured; figures of different protocols are not comparable."""

    threads: int = Field(description="of each runtime, on as many cores")
    prefill: int = Field(description="tokens of the prompt that is timed")
    prompt: int = Field(description="tokens that stand before those written")
    decode: int = Field(description="tokens that each sequence goes on with, greedily")
    turns: int = Field(description="turns of each model for every figure, at least")
    slice_seconds: float | None = Field(
        None,
        description="the turns of a round go on side by side, so long of each at a time; null if "
        "each runs to its end",
    )
    confidence: float = Field(description="of intervals of the median, 0.94 for five turns")


class Repetition(BaseModel):
    """One turn."""

    seconds: float = Field(description="wall time, while the process was let run")
    processor_seconds: float = Field(description="of all threads of the process")


class Ratio(BaseModel):
    """How many times faster than the base a model is, turn by turn."""

    base: str = Field(description="label of the model that it is held against")
    median: float
    interval: tuple[float, float] = Field(description="of the median")
    range: tuple[float, float] = Field(description="of all turns")


class BenchFigure(BaseModel):
    """One kind of work."""

    work: Literal["load", "prefill", "decode"]
    batch: int = Field(description="sequences at once")
    tokens: int = Field(description="of each sequence that are counted; 0 for loading")
    clock: Literal["processor", "wall"] = Field(
        description="what seconds are: processor time where one thread computes, which others on "
        "the machine do not lengthen, else wall time"
    )
    seconds: float = Field(description="median of the turns")
    tokens_per_second: float | None = Field(description="of all sequences; null for loading")
    ratio: Ratio | None = Field(description="null for the base itself")
    repetitions: list[Repetition]


class Memory(BaseModel):
    """Resident size of the process."""

    before: int = Field(description="bytes with the runtime imported and no model loaded")
    loaded: int = Field(description="bytes after loading, with the first token written")
    peak: int = Field(description="largest so far, all figures measured")


class BenchModel(BaseModel):
    """One model in one runtime."""

    label: str
    path: str
    runtime: str
    version: str
    form: str = Field(
        description="dtype of products, or type of most weights in the file, and the kernel that "
        "multiplies them where the runtime says so"
    )
    device: str
    file_bytes: int = Field(description="of the weights on disk")
    memory: Memory
    figures: list[BenchFigure]


class Bench(BaseModel):
    """Everything that was measured, in turn and on one machine."""

    schema_version: int = 1
    machine: Machine
    protocol: BenchProtocol
    models: list[BenchModel]
    sound: bool = Field(description="every ratio is known to 3 %")
    busy_cores: float = Field(
        description="cores that others used on average while turns were taken"
    )
    seconds: float = Field(description="wall time of all of it")
    notes: list[str] = Field(description="what to know before quoting this")
