"""The pruning plan: how many zeros every linear gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from secateur.architecture import BlockList, find_linears
from secateur.architecture.experts import unstacked_experts
from secateur.errors import SecateurError
from secateur.pattern import NM, Pattern, Unstructured, check_width, proportional_counts


@dataclass(frozen=True)
class Plan:
    """Exact zeros per linear.

    Attributes:
        pattern: what masks must look like.
        weights: number of weights of each linear, by full name in block order.
        zeros: number of zeros of each linear.
    """

    pattern: Pattern
    weights: Mapping[str, int]
    zeros: Mapping[str, int]

    @property
    def sparsity(self) -> float:
        """Zeros over weights, all linears together."""
        return sum(self.zeros.values()) / sum(self.weights.values())


def uniform_plan(blocks: BlockList, pattern: Pattern) -> Plan:
    """Give every linear the same sparsity; all zeros together are exactly round(s · weights).

    Raises:
        SecateurError: a linear's width does not fit an n:m pattern.
    """
    weights: dict[str, int] = {}
    for index, block in enumerate(blocks):
        with unstacked_experts(block):
            _require_known_experts(block, blocks.name(index))
            for linear in find_linears(block):
                name = f"{blocks.name(index)}.{linear.name}"
                rows, columns = linear.weight_OI.shape
                try:
                    check_width(pattern, columns)
                except SecateurError as error:
                    raise SecateurError(f"{name}: {error}") from error
                weights[name] = rows * columns
    sizes = list(weights.values())
    match pattern:
        case Unstructured(sparsity=sparsity):
            zeros = proportional_counts(round(sparsity * sum(sizes)), sizes)
        case NM(n=n, m=m):
            zeros = [size // m * (m - n) for size in sizes]
    return Plan(pattern, weights, dict(zip(weights, zeros, strict=True)))


def _require_known_experts(block: nn.Module, name: str) -> None:
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            raise SecateurError(
                f"{name}.{parameter_name} stacks experts in a layout that is not supported yet, "
                "and leaving them dense would miss the sparsity; choose another model."
            )
