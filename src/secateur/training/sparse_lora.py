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

    def __init__(self, a_RI: Tensor, b_OR: Tensor) -> None:
        super().__init__()
        self.a_RI = nn.Parameter(a_RI)
        self.b_OR = nn.Parameter(b_OR)

    @classmethod
    def start(cls, shape: tuple[int, int], rank: int, generator: torch.Generator) -> SparseLoRA:
        """The product of a weight of that shape before it is trained."""
        height, width = shape
        bound = 1 / math.sqrt(width)
        a_RI = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
        return cls(a_RI, torch.zeros(height, rank))

    def part(self, rows: slice) -> SparseLoRA:
        """The product's rows of one process, which has all of A."""
        return SparseLoRA(self.a_RI.data, self.b_OR.data[rows].clone())

    def product(self) -> Tensor:
        """What is added to the weight before it is masked, fp32 (out, in)."""
        return self.b_OR @ self.a_RI

    @torch.no_grad()
    def take_gradient(self, gradient_OI: Tensor) -> None:
        """Set the gradients of A and B to what that of the product makes them."""
        self.a_RI.grad = self.b_OR.T @ gradient_OI
        self.b_OR.grad = gradient_OI @ self.a_RI.T
