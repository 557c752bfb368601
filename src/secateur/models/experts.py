"""Show the experts of a mixture as ordinary linears.

Recent model classes keep all experts of a block in a few stacked parameters. While a block is
worked on, they are shown as linears of each expert whose weights are views of the stack, so that
statistics, masks and writes reach single experts and nothing is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList, TransposedLinear, find_linears
from secateur.runs.errors import SecateurError

# Share of a block's weights that may lie outside its linears: small gates, states of a recurrence.
_OUTSIDE = 0.1


Layout = Callable[[Tensor], Tensor]
"""From a parameter as it is stored to weights (…, out, in); a view."""


class _Expert(nn.Module):
    """One expert: views into the stacked parameters."""

    def __init__(self, views: dict[str, nn.Module], gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, view in views.items():
            self.add_module(name, view)
        # A module in a list of its own is no child.
        self._gate = [gate]

    def forward(self, x_NI: Tensor) -> Tensor:
        first, last = self.children()
        out_NI: Tensor = last(self._gate[0](first(x_NI)))
        return out_NI


class _RoutedExperts(nn.Module):
    """Each token goes to a few experts, whose outputs are added by weight."""

    def __init__(self, experts: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.post_expert_norm = norm

    def forward(self, x_NI: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out_NI = torch.zeros_like(x_NI)
        for index, expert in enumerate(self.experts):
            token, position = torch.where(top_k_index == index)
            if token.numel() == 0:
                continue
            y_NI = expert(x_NI[token])
            if self.post_expert_norm is not None:
                y_NI = self.post_expert_norm(y_NI)
            y_NI = y_NI * top_k_weights[token, position, None]
            out_NI.index_add_(0, token, y_NI.to(out_NI.dtype))
        return out_NI


class _ScaledExperts(nn.Module):
    """Every expert gets every token, scaled by the router, an expert after the other."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x_NI: Tensor) -> Tensor:
        parts = x_NI.chunk(len(self.experts))
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


class _SortedExperts(nn.Module):
    """One linear of all experts; tokens come sorted by expert, and how many each expert has."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        parts = inputs.split(expert_size)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


class _JoinedExperts(nn.Module):
    """Experts whose three matrices lie one below the other in two-dimensional parameters."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.routed = _RoutedExperts(experts)

    def forward(self, x_BLI: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out_NI: Tensor = self.routed(x_BLI.flatten(0, -2), top_k_index, top_k_weights)
        return out_NI.view(len(x_BLI), -1, out_NI.shape[-1])


class _JoinedExpert(nn.Module):
    def __init__(
        self,
        w1_OI: Tensor,
        v1_OI: Tensor,
        w2_IO: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.w1, self.v1 = _view(w1_OI), _view(v1_OI)
        self.w2 = _view(w2_IO, transposed=True)
        self._activation = activation

    def forward(self, x_NI: Tensor) -> Tensor:
        out_NI: Tensor = self.w2(self._activation(self.w1(x_NI)) * self.v1(x_NI))
        return out_NI


@contextmanager
def unstacked_experts(module: nn.Module) -> Iterator[None]:
    """Within the context, stacked experts of a block, or of a model, appear as linears."""
    stacks = [
        (parent, name, child, stack.shown)
        for parent in module.modules()
        for name, child in parent.named_children()
        if (stack := _stack(child)) is not None
    ]
    for parent, name, _, shown in stacks:
        setattr(parent, name, shown)
    try:
        yield
    finally:
        for parent, name, child, _ in stacks:
            setattr(parent, name, child)


def stored_weights(block: nn.Module) -> dict[str, Layout]:
    """Parameters of a block that hold its linears, by name, and how to see (…, out, in) in each.

    A parameter that holds the same linear of several experts has them in front.
    """
    weights: dict[str, Layout] = {
        f"{linear.name}.weight": _transposed if linear.transposed else _as_it_is
        for linear in find_linears(block)
    }
    for name, module in block.named_modules():
        if (stack := _stack(module)) is not None:
            weights |= {f"{name}.{own}": layout for own, layout in stack.weights.items()}
    return weights


def linear_shapes(blocks: BlockList) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of all linears that are worked on by full name, in block order.

    Raises:
        SecateurError: a block stacks experts in a layout that cannot be shown as linears, or
            keeps much of its weights in other modules than linears.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(blocks):
        with unstacked_experts(block):
            _require_linears(block, blocks.name(index))
            for linear in blocks.linears(index):
                rows, columns = linear.weight_OI.shape
                shapes[f"{blocks.name(index)}.{linear.name}"] = rows, columns
    if not shapes:
        raise SecateurError(
            f"The blocks of {type(blocks.model).__name__} have no linears; there is nothing to "
            "prune."
        )
    return shapes


def _require_linears(block: nn.Module, name: str) -> None:
    """Raise SecateurError if a good part of a block's weights are not those of linears."""
    linears = {id(linear.module.get_parameter("weight")) for linear in find_linears(block)}
    known = {
        id(parameter)
        for module in block.modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False)
    }
    inside = sum(each.numel() for each in block.parameters() if id(each) in linears)
    others = {
        parameter_name: parameter.numel()
        for parameter_name, parameter in block.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in linears | known
    }
    if sum(others.values()) > _OUTSIDE * inside:
        largest = max(others, key=lambda other: others[other])
        raise SecateurError(
            f"{name}.{largest} holds weights in a layout that is not supported yet, and leaving "
            "them dense would miss the sparsity; choose another model."
        )


class _Stack(NamedTuple):
    """Stacked experts: the module that shows them as linears, and how their weights lie."""

    shown: nn.Module
    weights: dict[str, Layout]


def _stack(module: nn.Module) -> _Stack | None:
    """What stacked experts are, None for any other module."""
    own = module._parameters
    if own.keys() == {"weight"} and own["weight"] is not None:
        return _parallel(module)
    if "down_proj" in own:
        return _two_matrices(module)
    joined = module._modules.get("mlp")
    if joined is not None and joined._parameters.keys() == {"w1", "v1", "w2"}:
        return _joined(module, joined)
    return None


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def _parallel(stack: nn.Module) -> _Stack | None:
    weight = stack.get_parameter("weight").data
    if weight.ndim != 3 or _arguments(stack) != ["inputs", "expert_size"]:
        return None
    shown = _SortedExperts([_view(w_OI) for w_OI in weight])
    return _Stack(shown, {"weight": _as_it_is})


def _joined(stack: nn.Module, mlp: nn.Module) -> _Stack | None:
    activation = getattr(mlp, "activation_fn", None)
    if activation is None or _arguments(stack) != ["hidden_states", "top_k_index", "top_k_weights"]:
        return None
    width: int = mlp.ffn_hidden_size  # type: ignore[assignment]
    w1, v1, w2 = (mlp.get_parameter(name).data.split(width) for name in ("w1", "v1", "w2"))
    shown = _JoinedExperts(
        [_JoinedExpert(*each, activation) for each in zip(w1, v1, w2, strict=True)]
    )
    return _Stack(
        shown,
        {
            "mlp.w1": _as_it_is,
            "mlp.v1": _as_it_is,
            "mlp.w2": lambda weight: weight.unflatten(0, (-1, width)).mT,
        },
    )


def _two_matrices(stack: nn.Module) -> _Stack | None:
    """Experts of two matrices, as transformers' own interface for experts describes them.

    A class that does not describe itself is taken by the shapes of the interface's default; or,
    if it is called with hidden states alone, as every expert getting every token.
    """
    described = hasattr(stack, "has_gate")
    gated = getattr(stack, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    up, down = stack._parameters.get(first), stack._parameters.get("down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        return None
    scaled = not described and len(_arguments(stack)) == 1
    transposed = bool(getattr(stack, "is_transposed", scaled))
    into, out = (2, 1) if transposed else (1, 2)
    # The first matrix gives what the second takes, twice it where half of it gates the other.
    if up.shape[into] != down.shape[out] * (2 if gated else 1) or up.shape[out] != down.shape[into]:
        return None
    named = {first, "down_proj"}
    if getattr(stack, "has_bias", False):
        named |= {f"{name}_bias" for name in named}
    activation = getattr(stack, "act_fn", None)
    gate = getattr(stack, "_apply_gate", None) if gated else activation
    if gate is None and isinstance(activation, nn.Module):
        gate = partial(_gated, activation)
    if stack._parameters.keys() != named or gate is None:
        return None

    def view(name: str, index: int) -> nn.Module:
        bias = stack._parameters.get(f"{name}_bias")
        return _view(
            stack.get_parameter(name).data[index],
            None if bias is None else bias.data[index],
            transposed=transposed,
        )

    experts: list[nn.Module] = [
        _Expert({name: view(name, index) for name in (first, "down_proj")}, gate)
        for index in range(len(up))
    ]
    norm: Any = stack.post_expert_norm if getattr(stack, "has_post_expert_norm", False) else None
    shown = _ScaledExperts(experts) if scaled else _RoutedExperts(experts, norm)
    layout = _transposed if transposed else _as_it_is
    return _Stack(shown, {first: layout, "down_proj": layout})


def _arguments(module: nn.Module) -> list[str]:
    """Names of what a module is called with."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _gated(activation: Callable[[Tensor], Tensor], gate_up_NI: Tensor) -> Tensor:
    gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
    return activation(gate_NI) * up_NI


def _view(weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> nn.Module:
    linear: nn.Module
    if transposed:
        linear = TransposedLinear(weight, bias)
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
