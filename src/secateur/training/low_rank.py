"""Products of two thin matrices beside a sparse linear: SLoRB and LoRA under a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.runs.errors import SecateurError


class SLoRB(nn.Module):
    """S·(X·x), added to the output of a linear (AST, section 4.3).

    Attributes:
        x_RI: at the start it sums groups of consecutive inputs.
        s_OR: at the start the mean of the removed weights in each group.
    """

    def __init__(self, removed_OI: Tensor, group: int, *, train_projection: bool) -> None:
        super().__init__()
        width = removed_OI.shape[1]
        check_group(width, group)
        x_RI = torch.eye(width // group, device=removed_OI.device).repeat_interleave(group, 1)
        self.x_RI = nn.Parameter(x_RI, requires_grad=train_projection)
        self.s_OR = nn.Parameter(removed_OI.unflatten(1, (-1, group)).mean(2))

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of products."""
        return functional.linear(functional.linear(x, self.x_RI), self.s_OR)


def check_group(width: int, group: int) -> None:
    """Raise SecateurError if rows of ``width`` columns cannot be cut into groups for SLoRB."""
    if width % group:
        raise SecateurError(
            f"a low-rank boost of one rank per {group} columns needs a width divisible by {group}, "
            f"but the width is {width}; choose another group"
        )


class MaskedLoRA(nn.Module):
    """B·A, added to a weight before it is masked, so that merging it fills no zero.

    The linear runs with m∘(w + B·A), w at rest. LoRA: arXiv 2106.09685.

    Attributes:
        a_RI: at the start uniform with variance 1 / (3·in).
        b_OR: at the start zero.
    """

    def __init__(self, a_RI: Tensor, b_OR: Tensor) -> None:
        super().__init__()
        self.a_RI = nn.Parameter(a_RI)
        self.b_OR = nn.Parameter(b_OR)

    @classmethod
    def start(cls, shape: tuple[int, ...], rank: int, generator: torch.Generator) -> MaskedLoRA:
        """The product of a weight of shape (out, in) before it is trained."""
        height, width = shape
        bound = 1 / math.sqrt(width)
        a_RI = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
        return cls(a_RI, torch.zeros(height, rank))

    def part(self, rows: slice) -> MaskedLoRA:
        """The product's rows of one process, which has all of A."""
        return MaskedLoRA(self.a_RI.data, self.b_OR.data[rows].clone())

    def product(self) -> Tensor:
        """What is added to the weight before it is masked, fp32 (out, in)."""
        return self.b_OR @ self.a_RI

    @torch.no_grad()
    def take_gradient(self, gradient_OI: Tensor) -> None:
        """Set the gradients of A and B to what that of the product makes them."""
        self.a_RI.grad = self.b_OR.T @ gradient_OI
        self.b_OR.grad = gradient_OI @ self.a_RI.T
