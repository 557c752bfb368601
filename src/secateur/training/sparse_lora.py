"""LoRA whose product is masked like the weight it is added to, so that merging keeps every zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SparseLoRA(nn.Module):
    """B·A, nothing at the start; the linear runs with m∘(w + B·A), w at rest.

    Attributes:
        a_RI: as LoRA (arXiv 2106.09685) has it at the start, uniform with variance 1 / (3·in).
        b_OR: zero at the start.
    """

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        height, width = shape
        bound = 1 / math.sqrt(width)
        a_RI = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
        self.a_RI = nn.Parameter(a_RI)
        self.b_OR = nn.Parameter(torch.zeros(height, rank))

    def product(self) -> Tensor:
        """What is added to the weight before it is masked, fp32 (out, in)."""
        return self.b_OR @ self.a_RI
