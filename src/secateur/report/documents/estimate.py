"""What ``estimate`` says of a run before it starts."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Estimate(BaseModel):
    """Memory and work of a run."""

    model: str
    streamed: bool = Field(description="one block in memory at a time")
    blocks: int
    weights: int = Field(description="weights in the linears of all blocks")
    zeros: int
    peak_memory_bytes: int
    activation_bytes: int
    activations_in: str = Field(description="memory, or a mapped file")
    forward_flops: float
    statistics_flops: float
    output_bytes: int = Field(description="tensors of the result; masks and headers are small")
