"""Find the linears of one block, whatever class holds them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Choosing an expert wrongly costs more than a router's few weights could ever save.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: name inside the block, such as ``self_attn.q_proj``.
        module: the module that holds the weight.
        transposed: the module stores (in, out) instead of (out, in).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def kind(self) -> str:
        """The name without numbers: the same for all experts of a mixture."""
        return re.sub(r"\d+", "*", self.name)

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (out, in); a view, so writing into it writes into the module."""
        weight = self.module.get_parameter("weight").data
        return weight.T if self.transposed else weight

    @property
    def parameter_OI(self) -> Tensor:
        """The weight as (out, in), with its gradient going to the module."""
        weight = self.module.get_parameter("weight")
        return weight.T if self.transposed else weight

    @property
    def bias_O(self) -> Tensor | None:
        """The bias, None without one; the module's own, as the weight."""
        bias = self.module._parameters.get("bias")
        return None if bias is None else bias.data


def find_linears(block: nn.Module) -> list[Linear]:
    """Return the prunable linears of a block in definition order; routers are left alone.

    A linear without weights, what is left of attention that lost all its heads, is none.
    """
    return [
        Linear(name, module, transposed=isinstance(module, Conv1D))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.rpartition(".")[2] not in ROUTERS
        and module.weight.numel() > 0
    ]
