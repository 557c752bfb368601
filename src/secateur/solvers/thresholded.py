"""Linears whose cheap weights are removed, and what the loss says of the dearest of these.

The slope of a row is the mean over its margin, the weights whose cost is near the threshold, of
−W·G, with G the loss's gradient at the weights without those removed. That is the first-order
change of the loss on removing a kept weight, and minus the change on bringing a removed one back,
so that both sides of the margin say the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from secateur.solvers.autocast import apply_linear
from secateur.solvers.chunks import row_chunks
from secateur.solvers.margin import RowCosts

# Weights whose expected rise is within this factor of the threshold's are the margin of their row.
_MARGIN = 1.5


def thresholded_linear(
    x: Tensor,
    costs: RowCosts,
    threshold: float,
    removed_O: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x Ŵᵀ + b with the weights that cost more than the threshold.

    The gradient of ``removed_O`` is the slope of each row: a product of the inputs with the weights
    of the margin, times the gradient of the outputs. That of the weights is never made.

    Args:
        x: Inputs, (…, I).
        costs: Of the linear, which has finite weights.
        threshold: Positive.
        removed_O: Takes the slopes; the values are not used.
        bias_O: Added to the output.

    Returns:
        Outputs, (…, O), under autocast in its dtype.
    """
    return apply_linear(_ThresholdedLinear, x, costs, threshold, removed_O, bias_O=bias_O)


def trained_linear(
    x: Tensor,
    w_OI: Tensor,
    costs: RowCosts,
    threshold: float,
    removed_O: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """As `thresholded_linear`, with weights that have moved on from those that costs are of.

    Weights that are removed have no gradient; slopes come from that of all weights.

    Args:
        x: Inputs, (…, I).
        w_OI: Weights, finite, fp32 or float64; those removed as they would come back.
        costs: What removes them.
        threshold: Positive.
        removed_O: Takes the slopes; the values are not used.
        bias_O: Added to the output.

    Returns:
        Outputs, (…, O), under autocast in its dtype.
    """
    return apply_linear(_TrainedLinear, x, w_OI, costs, threshold, removed_O, bias_O=bias_O)


class _ThresholdedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, costs: RowCosts, threshold: float, removed_O: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.costs, ctx.threshold = costs, threshold
        return functional.linear(x, _kept(costs.w_OI, costs, threshold, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (gradient_y,) = gradients
        costs, threshold = ctx.costs, ctx.threshold
        gradient_x = slope_O = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient_y @ _kept(costs.w_OI, costs, threshold, x.dtype)
        if ctx.needs_input_grad[3]:
            margin_OI, members_O = _margin(costs, threshold, x.dtype)
            product = functional.linear(x, margin_OI).mul_(gradient_y).flatten(0, -2)
            dtype = torch.promote_types(torch.float32, product.dtype)
            slope_O = product.sum(0, dtype=dtype).div_(members_O.clamp_min(1)).neg_()
        return gradient_x, None, None, slope_O


class _TrainedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_OI: Tensor, costs: RowCosts, threshold: float, removed_O: Tensor
    ) -> Tensor:
        kept_OI = _kept(w_OI, costs, threshold, x.dtype)
        ctx.save_for_backward(x, w_OI, kept_OI)
        ctx.costs, ctx.threshold = costs, threshold
        return functional.linear(x, kept_OI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, kept_OI = ctx.saved_tensors
        (gradient_y,) = gradients
        gradient_x = gradient_y @ kept_OI if ctx.needs_input_grad[0] else None
        gradient_OI = (gradient_y.flatten(0, -2).T @ x.flatten(0, -2)).to(w_OI.dtype)
        slopes = []
        for rows in row_chunks(gradient_OI):
            cost_RI = ctx.costs.of(rows)
            near_RI = _near(cost_RI, ctx.threshold)
            members_R = near_RI.sum(1).clamp_min_(1)
            slope_RI = near_RI.mul_(w_OI[rows]).mul_(gradient_OI[rows])
            slopes.append(slope_RI.sum(1).div_(members_R).neg_())
            gradient_OI[rows] *= _above(cost_RI, ctx.threshold)
        return gradient_x, gradient_OI, None, None, torch.cat(slopes)


def _kept(w_OI: Tensor, costs: RowCosts, threshold: float, dtype: torch.dtype) -> Tensor:
    kept_OI = torch.empty(w_OI.shape, dtype=dtype, device=w_OI.device)
    for rows in row_chunks(kept_OI):
        above_RI = _above(costs.of(rows), threshold).to(dtype)
        torch.mul(w_OI[rows].to(dtype), above_RI, out=kept_OI[rows])
    return kept_OI


def _margin(costs: RowCosts, threshold: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights near the threshold, the others zero, and their number in each row."""
    margin_OI = torch.empty(costs.w_OI.shape, dtype=dtype, device=costs.w_OI.device)
    members = []
    for rows in row_chunks(margin_OI):
        near_RI = _near(costs.of(rows), threshold)
        torch.mul(costs.w_OI[rows].to(dtype), near_RI.to(dtype), out=margin_OI[rows])
        members.append(near_RI.sum(1))
    return margin_OI, torch.cat(members)


def _near(cost_RI: Tensor, threshold: float) -> Tensor:
    """1 where a weight is of the margin, else 0."""
    factor = _MARGIN**0.5
    near_RI = _above(cost_RI.clone(), threshold / factor)
    return near_RI.sub_(_above(cost_RI.clone(), threshold * factor))


def _above(cost_RI: Tensor, threshold: float) -> Tensor:
    """1 where a cost exceeds the threshold, else 0, in place; far faster than bool on a CPU."""
    return cost_RI.sub_(threshold).sign_().clamp_(min=0)
