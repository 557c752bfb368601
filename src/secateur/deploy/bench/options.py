"""What the user may say about a measurement."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator

from secateur.deploy.bench.runtimes import RUNTIMES
from secateur.runs.device import DtypeName
from secateur.runs.options import Options, nearest

# A warm-up and so many turns of each contender are the least that a figure rests on.
FEWEST_TURNS = 5
_LARGEST_BATCH = 1024


def _read_sizes(value: Any) -> Any:
    """``1,4,16`` as a list, in order and each once."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    try:
        sizes = sorted({int(each) for each in value})
    except (TypeError, ValueError) as error:
        raise ValueError("whole numbers, such as 1,4,16, were expected") from error
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= _LARGEST_BATCH:
        raise ValueError(f"sizes from 1 to {_LARGEST_BATCH} were expected")
    return tuple(sizes)


Sizes = Annotated[tuple[int, ...], BeforeValidator(_read_sizes)]


class BenchOptions(Options):
    """How models are measured."""

    noun: ClassVar[str] = "bench options"

    batch: Sizes = Field((1, 4, 16), description="sequences at once, several sizes with commas")
    prefill: int = Field(512, ge=1, le=2**20, description="tokens of the prompt that is timed")
    prompt: int = Field(32, ge=1, le=2**20, description="tokens that stand before those written")
    decode: int = Field(64, ge=1, le=2**20, description="tokens that each sequence goes on with")
    turns: int = Field(
        FEWEST_TURNS,
        ge=FEWEST_TURNS,
        le=1000,
        description="turns of each model for every figure, at least; a warm-up comes before",
    )
    limit: float = Field(
        180.0,
        gt=0,
        le=86400,
        description="seconds for one figure of all models: more turns are taken until its ratios "
        "are known to 1 %, and larger batches that do not fit are left out",
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="threads of each runtime; all cores if left out"
    )
    runtimes: tuple[str, ...] = Field(
        (), description="only these runtimes: transformers, llama.cpp, openvino"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N, for transformers")
    dtype: DtypeName = Field(
        "auto",
        description="of transformers: bfloat16 where the machine is made for it, else float32",
    )

    @field_validator("runtimes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in RUNTIMES:
                raise ValueError(f"{name} is no runtime; {nearest(name, RUNTIMES, 'known are')}")
        return names

    @property
    def length(self) -> int:
        """The most tokens that a sequence has."""
        return max(self.prefill + 1, self.prompt + self.decode + 1)
