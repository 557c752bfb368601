"""Show the experts of a mixture as ordinary linears.

Recent model classes keep all experts of a block in two stacked parameters. While a block is
worked on, they are shown as one ``nn.Linear`` per expert whose weights are views of the stack,
so that statistics, masks and writes reach single experts and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList, find_linears
from secateur.runs.errors import SecateurError


class _Expert(nn.Module):
    """One expert: views into the stacked parameters."""

    def __init__(
        self, gate_up_OI: Tensor, down_OI: Tensor, gate: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_up_proj = _view(gate_up_OI)
        self.down_proj = _view(down_OI)
        self._gate = gate

    def forward(self, x_NI: Tensor) -> Tensor:
        out_NI: Tensor = self.down_proj(self._gate(self.gate_up_proj(x_NI)))
        return out_NI


class UnstackedExperts(nn.Module):
    """Same results as the stacked experts, one linear at a time."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        gate_up = stack.get_parameter("gate_up_proj").data
        down = stack.get_parameter("down_proj").data
        # Some families gate in a way of their own, which the stack knows.
        gate = getattr(stack, "_apply_gate", None) or partial(_gated, stack.get_submodule("act_fn"))
        self.experts = nn.ModuleList(
            _Expert(gate_up_OI, down_OI, gate)
            for gate_up_OI, down_OI in zip(gate_up, down, strict=True)
        )

    def forward(self, x_NI: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out_NI = torch.zeros_like(x_NI)
        for index, expert in enumerate(self.experts):
            token, position = torch.where(top_k_index == index)
            if token.numel() == 0:
                continue
            y_NI = expert(x_NI[token]) * top_k_weights[token, position, None]
            out_NI.index_add_(0, token, y_NI.to(out_NI.dtype))
        return out_NI


@contextmanager
def unstacked_experts(block: nn.Module) -> Iterator[None]:
    """Within the context, stacked experts of the block appear as linears."""
    stacks = [
        (parent, name, child)
        for parent in block.modules()
        for name, child in parent.named_children()
        if _is_stack(child)
    ]
    for parent, name, child in stacks:
        setattr(parent, name, UnstackedExperts(child))
    try:
        yield
    finally:
        for parent, name, child in stacks:
            setattr(parent, name, child)


def linear_shapes(blocks: BlockList) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of all prunable linears by full name, in block order.

    Raises:
        SecateurError: a block stacks experts in a layout that cannot be shown as linears.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(blocks):
        with unstacked_experts(block):
            _require_known_experts(block, blocks.name(index))
            for linear in find_linears(block):
                rows, columns = linear.weight_OI.shape
                shapes[f"{blocks.name(index)}.{linear.name}"] = rows, columns
    return shapes


def _require_known_experts(block: nn.Module, name: str) -> None:
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            raise SecateurError(
                f"{name}.{parameter_name} stacks experts in a layout that is not supported yet, "
                "and leaving them dense would miss the sparsity; choose another model."
            )


def _is_stack(module: nn.Module) -> bool:
    """Stacks stored as (expert, in, out) or with biases follow other formulas: left dense."""
    gate_up = module._parameters.get("gate_up_proj")
    down = module._parameters.get("down_proj")
    return (
        gate_up is not None
        and down is not None
        and gate_up.ndim == 3
        and down.ndim == 3
        and gate_up.shape[1] == 2 * down.shape[2]
        and gate_up.shape[2] == down.shape[1]
        and isinstance(getattr(module, "act_fn", None), nn.Module)
        and not any("bias" in name for name in module._parameters)
        and not getattr(module, "is_transposed", False)
    )


def _gated(activation: Callable[[Tensor], Tensor], gate_up_NI: Tensor) -> Tensor:
    gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
    return activation(gate_NI) * up_NI


def _view(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    return linear
