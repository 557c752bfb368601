"""Let rows with dear marginal weights keep more of them.

Removing weight w_rj is expected to raise the loss by g_r · w_rj² · mean(x_j²), g_r being how
sensitive the loss is to row r. Here everything is told in square roots,

    cost_rj = g_r^½ · |w_rj| · mean(x_j²)^½ ,

which are made anew, a few rows at a time, whenever they are looked at: all that is kept of them is
one number for each row and one for each column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from secateur.solvers.chunks import row_chunks
from secateur.solvers.order import smallest

# Weights whose expected rise is within this factor of the threshold's are the margin of their row.
_MARGIN = 1.5

# One weight in so many says where a threshold lies.
_SAMPLED = 13


@dataclass(frozen=True)
class RowCosts:
    """What it costs to remove each weight of a linear.

    Attributes:
        w_OI: Weights, fp32.
        norm_I: Root mean square of each input.
        root_O: Square root of each row's sensitivity; the one thing that changes.
    """

    w_OI: Tensor
    norm_I: Tensor
    root_O: Tensor

    def of(self, rows: slice) -> Tensor:
        """Costs of some rows, (rows, in)."""
        return self.w_OI[rows].abs().mul_(self.norm_I).mul_(self.root_O[rows, None])

    def sample(self) -> Tensor:
        """Costs of a regular sample of the weights."""
        columns = self.w_OI.shape[1]
        taken_N = torch.arange(0, self.w_OI.numel(), _SAMPLED, device=self.w_OI.device)
        row_N = taken_N // columns
        column_N = taken_N - row_N * columns
        costs_N = self.w_OI[row_N, column_N].abs_()
        return costs_N.mul_(self.norm_I[column_N]).mul_(self.root_O[row_N])


def margin_threshold(costs: Iterable[RowCosts], share: float) -> float:
    """About the cost of the dearest weight if the cheapest share of all is removed; positive."""
    sample_N = torch.cat([each.sample() for each in costs])
    rank = min(max(1, round(share * len(sample_N))), len(sample_N))
    # Its square is positive too.
    found = float(sample_N.kthvalue(rank).values)
    return max(found, math.sqrt(torch.finfo(torch.float32).tiny))


def cheapest(costs: Sequence[RowCosts], zeros: int) -> list[Tensor]:
    """Masks, True = kept, that remove exactly the ``zeros`` cheapest weights of all linears."""

    def pieces() -> Iterator[Tensor]:
        return (each.of(rows) for each in costs for rows in row_chunks(each.w_OI))

    removed = smallest(pieces, zeros)
    masks = []
    for each in costs:
        mask_OI = torch.empty(each.w_OI.shape, dtype=torch.bool, device=each.w_OI.device)
        for rows in row_chunks(mask_OI):
            torch.logical_not(next(removed), out=mask_OI[rows])
        masks.append(mask_OI)
    return masks


def follow_margin(root_O: Tensor, slope_O: Tensor, threshold: float, pull: float) -> None:
    """Scale each row's costs by the loss's slope at the row's margin, in place.

    At the best rates the last weight removed from every row raises the loss alike: by T, the
    threshold's square, as the costs foretell it, and by the slope s as the loss itself has it
    (``thresholded_linear``). The row's costs are multiplied by the root of
    exp(pull · clip(s / T, −1, 1)).
    """
    root_O.mul_((slope_O / threshold**2).clamp_(-1, 1).mul_(pull / 2).exp_())


def thresholded_linear(
    x: Tensor,
    costs: RowCosts,
    threshold: float,
    removed_O: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x Ŵᵀ + b with the weights that cost more than the threshold.

    The gradient of ``removed_O`` is the loss's slope in the number of weights that each row loses:
    the mean over the row's margin of −W·G, G the gradient at Ŵ. That is the first-order change of
    the loss on removing a kept weight, and minus the change on bringing a removed one back, so that
    both sides of the margin say the same. It is a product of the inputs with the weights of the
    margin, times the gradient of the outputs: G itself is never made.

    Args:
        x: Inputs, (…, I).
        costs: Of the linear, which has finite weights.
        threshold: Positive.
        removed_O: Takes the gradient; the values are not used.
        bias_O: Added to the output.

    Returns:
        Outputs, (…, O), under autocast in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    apply: Callable[..., Tensor] = _ThresholdedLinear.apply
    y = apply(x, costs.w_OI, costs.norm_I, costs.root_O, threshold, removed_O)
    return y if bias_O is None else y + bias_O.to(y.dtype)


class _ThresholdedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_OI: Tensor,
        norm_I: Tensor,
        root_O: Tensor,
        threshold: float,
        removed_O: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, w_OI, norm_I, root_O)
        ctx.threshold = threshold
        return functional.linear(x, _kept(RowCosts(w_OI, norm_I, root_O), threshold, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, norm_I, root_O = ctx.saved_tensors
        (gradient_y,) = gradients
        costs = RowCosts(w_OI, norm_I, root_O)
        gradient_x = slope_O = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient_y @ _kept(costs, ctx.threshold, x.dtype)
        if ctx.needs_input_grad[5]:
            margin_OI, members_O = _margin(costs, ctx.threshold, x.dtype)
            product = functional.linear(x, margin_OI).mul_(gradient_y).flatten(0, -2)
            dtype = torch.promote_types(torch.float32, product.dtype)
            slope_O = product.sum(0, dtype=dtype).div_(members_O.clamp_min(1)).neg_()
        return gradient_x, None, None, None, None, slope_O


def _kept(costs: RowCosts, threshold: float, dtype: torch.dtype) -> Tensor:
    kept_OI = torch.empty(costs.w_OI.shape, dtype=dtype, device=costs.w_OI.device)
    for rows in row_chunks(kept_OI):
        above_RI = _above(costs.of(rows), threshold).to(dtype)
        torch.mul(costs.w_OI[rows].to(dtype), above_RI, out=kept_OI[rows])
    return kept_OI


def _margin(costs: RowCosts, threshold: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights near the threshold, the others zero, and their number in each row."""
    factor = _MARGIN**0.5
    margin_OI = torch.empty(costs.w_OI.shape, dtype=dtype, device=costs.w_OI.device)
    members = []
    for rows in row_chunks(margin_OI):
        cost_RI = costs.of(rows)
        near_RI = _above(cost_RI.clone(), threshold / factor)
        near_RI -= _above(cost_RI, threshold * factor)
        torch.mul(costs.w_OI[rows].to(dtype), near_RI.to(dtype), out=margin_OI[rows])
        members.append(near_RI.sum(1))
    return margin_OI, torch.cat(members)


def _above(cost_RI: Tensor, threshold: float) -> Tensor:
    """1 where a cost exceeds the threshold, else 0, in place; far faster than bool on a CPU."""
    return cost_RI.sub_(threshold).sign_().clamp_(min=0)
