"""Linears that run with a mask while all their weights are trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear
from secateur.training.low_rank import MaskedLoRA, SLoRB
from secateur.training.masks import RowBudget, as_factor


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype, through: bool
    ) -> Tensor:
        if not through:
            context.save_for_backward(mask)
        return weight.to(dtype) * as_factor(mask, dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        for mask in context.saved_tensors:
            gradient = gradient * as_factor(mask, gradient.dtype)
        return gradient, None, None, None


def masked_weight(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, *, straight_through: bool = True
) -> Tensor:
    """Return weight∘mask.

    Args:
        weight: fp32, trainable.
        mask: bool of the same shape, True = kept.
        dtype: of the result.
        straight_through: the gradient with respect to the result is handed to every weight, the
            removed ones included, so that they may come back (AST, eq. 3); otherwise to the kept
            ones alone, which is the true gradient.
    """
    masked: Tensor = _Masked.apply(weight, mask, dtype, straight_through)  # type: ignore[no-untyped-call]
    return masked


class MaskedLinear:
    """One linear, its mask, and perhaps a low-rank product beside it.

    Attributes:
        name: full name in the model.
        linear: where it is.
        weight: the parameter, removed weights included.
        rows: what each row keeps.
        mask: bool in the layout of the module's weight, which may be (in, out); True = kept.
        frozen: the mask stays, and removed weights are zero and get no gradient.
        low_rank: added to the output.
        lora: trained in place of the weight.
    """

    def __init__(
        self,
        name: str,
        linear: Linear,
        rows: RowBudget,
        mask_OI: Tensor,
        low_rank: SLoRB | None = None,
        lora: MaskedLoRA | None = None,
    ) -> None:
        self.name = name
        self.linear = linear
        self.weight = linear.module.get_parameter("weight")
        self.rows = rows
        self.mask = (mask_OI.T if linear.transposed else mask_OI).contiguous()
        self.frozen = False
        self.low_rank = low_rank
        self.lora = lora

    def part(self, weight: nn.Parameter, rows: slice) -> MaskedLinear:
        """The same linear where only some rows of the weight are held."""
        part = MaskedLinear(
            self.name,
            self.linear,
            self.rows.part(rows),
            self.mask_OI[rows].clone(),
            self.low_rank,
            None if self.lora is None else self.lora.part(rows),
        )
        part.weight = weight
        assert weight.shape == part.mask.shape, "rows are whole, so no group of a row is split"
        return part

    @property
    def mask_OI(self) -> Tensor:
        """The mask as (out, in), a view."""
        return self.in_rows(self.mask)

    def in_rows(self, tensor: Tensor) -> Tensor:
        """A tensor in the layout of the weight as (out, in), or the other way; a view."""
        return tensor.T if self.linear.transposed else tensor

    @torch.no_grad()
    def remove(self, *, rescale: bool = False) -> None:
        """Set the removed weights to zero; if asked to, give each row the norm that it had."""
        weight_OI = self.in_rows(self.weight)
        norm_O1 = weight_OI.norm(dim=1, keepdim=True)
        self.weight.mul_(as_factor(self.mask, self.weight.dtype))
        if rescale:
            left_O1 = weight_OI.norm(dim=1, keepdim=True)
            # A row that kept nothing but zeros has nothing to scale.
            weight_OI.mul_(torch.where(left_O1 > 0, norm_O1 / left_O1, 1.0))

    @torch.no_grad()
    def merge(self) -> None:
        """Add what was trained in place of the weight to it, where the mask keeps weights."""
        if self.lora is not None:
            self.weight.copy_(masked_weight(self.whole(), self.mask, self.weight.dtype))
            self.lora.b_OR.zero_()

    def whole(self) -> Tensor:
        """The weight before it is masked, with what is trained in place of it."""
        if self.lora is None:
            return self.weight
        # Left to autocast, the product would be rounded before it is added.
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight + self.in_rows(self.lora.product())

    def forward(self, x: Tensor) -> Tensor:
        """What the module returns in place of its own forward."""
        kind = x.device.type
        dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        )
        weight = masked_weight(self.whole(), self.mask, dtype, straight_through=not self.frozen)
        bias = self.linear.module._parameters.get("bias")
        y = functional.linear(x, weight.T if self.linear.transposed else weight, bias)
        return y if self.low_rank is None else y + self.low_rank(x)


def masked_forward(linears: Sequence[MaskedLinear]) -> AbstractContextManager[None]:
    """Within the context the modules run with their masks."""
    return replaced_forwards((each.linear.module, each.forward) for each in linears)
