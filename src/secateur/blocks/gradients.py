"""Gradients at the outputs of linears, in a pass of which only that part is differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from secateur.blocks.precision import products_of_bfloat16
from secateur.models.structure import Linear


@dataclass(frozen=True)
class LinearPass:
    """One call of a linear.

    Attributes:
        linear: the linear.
        x_NI: its inputs (tokens, in).
        output: where gradients of its output arrive.
    """

    linear: Linear
    x_NI: Tensor
    output: GradientEdge


@contextmanager
def recorded_passes(linears: Iterable[Linear]) -> Iterator[list[LinearPass]]:
    """Within the context, list the calls of these linears and record the graph behind them.

    What comes before the first of them has no graph, unless something else asks for one.
    """
    passes: list[LinearPass] = []

    def hook_for(linear: Linear) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)
            x_NI = args[0].detach().flatten(0, -2)
            passes.append(LinearPass(linear, x_NI, get_gradient_edge(output)))

        return record

    handles = [linear.module.register_forward_hook(hook_for(linear)) for linear in linears]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(
    scalar: Tensor, passes: Sequence[LinearPass], *, keep_graph: bool = False
) -> Iterator[tuple[LinearPass, Tensor]]:
    """Differentiate a scalar at the outputs of recorded calls.

    Yields:
        Each call that the scalar depends on, and the gradient of its output (tokens, out).
    """
    gradients = torch.autograd.grad(
        scalar, [each.output for each in passes], retain_graph=keep_graph, allow_unused=True
    )
    for each, gradient in zip(passes, gradients, strict=True):
        if gradient is not None:
            yield each, gradient.flatten(0, -2)


def weight_gradient(gradient_NO: Tensor, x_NI: Tensor) -> Tensor:
    """gradientᵀ x, fp32 (out, in); on the bf16 units where the gradient comes from them."""
    rounded = gradient_NO.dtype == torch.bfloat16
    with products_of_bfloat16(x_NI.device) if rounded else nullcontext():
        return gradient_NO.float().T @ x_NI.float()
