"""Linears whose rows lose their cheapest weights, with gradients for how many each row loses.

BESA, blockwise parameter-efficient sparsity allocation (Xu et al. 2024, arXiv 2402.16880). The
weights of a row are ranked once; a row then loses its k lowest-ranked weights. The mask has no
derivative, so the paper takes that of the probability with which a weight of rank i is pruned when
the rate is drawn from a learned distribution beta over candidates p_d, each of which removes n_d
weights:

    ∂L/∂beta_d = −A_d,    A_d = Σ_{rank(i) < n_d} W_i · (∂L/∂Ŵ)_i .

A_d sums over kept and pruned weights alike; −A_d is the first-order change of the loss if the row
went from dense to rate p_d. The released code builds that probability for each weight. Here the
backward pass sums W · ∂L/∂Ŵ in the order of ranks, which is the same number and needs two bytes
per weight for the ranks, and a few rows of temporaries.

With costs (``margin``) in place of ranks a row loses the weights below a threshold. The slope of
a row is the mean of −W·G over its margin, the weights whose cost is near the threshold, with G the
loss's gradient at the masked weights. It is the first-order change of the loss on removing a kept
weight, and minus the change on bringing a removed one back: both sides of the margin say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from secateur.patterns.pattern import refuse_nan
from secateur.solvers.margin import RowCosts
from secateur.solvers.pieces import row_chunks
from secateur.solvers.rates import rows_per_distribution

# The widest row whose ranks, and number of zeros, int16 holds.
_WIDEST_INT16 = 2**15 - 1
# Fewer rows than this make matrix products slow.
_FEWEST_ROWS = 128
# Weights whose expected rise is within this factor of the threshold's are the margin of their row.
_MARGIN = 1.5


def ascending_ranks(score_OI: Tensor) -> Tensor:
    """Position of each weight in its row's ascending order of scores; of equal ones, earlier first.

    Returns:
        rank_OI, int16 if the row's length fits, else int32.

    Raises:
        SecateurError: A score is NaN.
    """
    refuse_nan(score_OI)
    columns = score_OI.shape[1]
    dtype = torch.int16 if columns <= _WIDEST_INT16 else torch.int32
    rank_OI = torch.empty(score_OI.shape, dtype=dtype, device=score_OI.device)
    position_I = torch.arange(columns, dtype=dtype, device=score_OI.device)
    for rows in row_chunks(score_OI):
        order_RI = score_OI[rows].argsort(dim=1, stable=True)
        rank_OI[rows].scatter_(1, order_RI, position_I.expand_as(order_RI))
    return rank_OI


def mask_of_counts(rank_OI: Tensor, count_O: Tensor) -> Tensor:
    """mask_OI, True = kept: each row loses its count_O lowest ranks."""
    return rank_OI >= count_O.to(rank_OI.dtype)[:, None]


def apply_counts(w_OI: Tensor, rank_OI: Tensor, count_O: Tensor) -> Tensor:
    """Copy of finite weights, exactly zero (+0) where ``mask_of_counts`` is False."""
    # −1 where the rank is below the count, else 0; small integers are far faster than bool here.
    pruned_OI = (rank_OI - count_O.to(rank_OI.dtype)[:, None]).clamp_(-1, 0)
    return torch.addcmul(w_OI, w_OI, pruned_OI)


def removal_curve(product_RC: Tensor, rank_RC: Tensor, counts_D: Tensor) -> Tensor:
    """A_rd, the sum of the products W · ∂L/∂Ŵ whose rank in row r is below counts_d.

    Args:
        product_RC: W · ∂L/∂Ŵ.
        rank_RC: Ranks, a permutation in each row.
        counts_D: int64, in any order, from 0 to the number of columns.
    """
    ordered_RC = torch.empty_like(product_RC).scatter_(1, rank_RC.long(), product_RC)
    curve_RD = ordered_RC.cumsum_(1).index_select(1, (counts_D - 1).clamp_min(0))
    return curve_RD.masked_fill_(counts_D == 0, 0)


def masked_linear(
    x: Tensor,
    w_OI: Tensor,
    rank_OI: Tensor,
    count_O: Tensor,
    beta_GD: Tensor,
    counts_D: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x Ŵᵀ + b with Ŵ = ``apply_counts(…)``, whose gradient goes to ``beta_GD``.

    The weights have a gradient, that of the kept ones, only if they want it, as values on a grid
    with a learned range do. Neither masked weights nor their gradient outlive a call: the former
    are made again in the backward pass, of the latter there are a few rows at a time. Under
    autocast the product is in autocast's dtype.

    Args:
        x: Inputs, (…, I).
        w_OI: Weights, finite.
        rank_OI: Their ranks.
        count_O: Zeros of each row, integers in [0, I].
        beta_GD: Distributions over candidate rates; each serves O / G consecutive rows. The
            values are not used: the counts say what they amount to. Zeros of shape (O, D) collect
            the curves −A_rd of all rows in their ``grad``.
        counts_D: Weights that each candidate removes, int64, on the weights' device.
        bias_O: Added to the output, (…, O).

    Raises:
        SecateurError: G does not divide the rows.
    """
    rows_per_distribution(len(w_OI), len(beta_GD))
    return _apply(_MaskedLinear, x, w_OI, rank_OI, count_O, beta_GD, counts_D, bias_O=bias_O)


def thresholded_linear(
    x: Tensor,
    costs: RowCosts,
    threshold: float,
    removed_O: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x Ŵᵀ + b with the weights that cost more than a positive threshold.

    The gradient of ``removed_O``, whose values are not used, is the slope of each row: a product
    of the inputs with the weights of the margin, times the gradient of the outputs. That of the
    weights is never made. Under autocast the product is in autocast's dtype.
    """
    return _apply(_ThresholdedLinear, x, costs, threshold, removed_O, bias_O=bias_O)


def trained_linear(
    x: Tensor,
    w_OI: Tensor,
    costs: RowCosts,
    threshold: float,
    removed_O: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:
    """As `thresholded_linear`, with weights that have moved on from those that costs are of.

    Removed weights have no gradient; they are given as they would come back. Slopes come from the
    gradient of all weights.
    """
    return _apply(_TrainedLinear, x, w_OI, costs, threshold, removed_O, bias_O=bias_O)


def _apply(
    function: type[Function], x: Tensor, *others: Any, bias_O: Tensor | None = None
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    apply: Callable[..., Tensor] = function.apply
    y = apply(x, *others)
    return y if bias_O is None else y + bias_O.to(y.dtype)


class _MaskedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_OI: Tensor,
        rank_OI: Tensor,
        count_O: Tensor,
        beta_GD: Tensor,
        counts_D: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, w_OI, rank_OI, count_O, counts_D)
        ctx.beta = (len(beta_GD), beta_GD.dtype)
        return functional.linear(x, apply_counts(w_OI.to(x.dtype), rank_OI, count_O))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, rank_OI, count_O, counts_D = ctx.saved_tensors
        (gradient_y,) = gradients
        gradient_x = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient_y @ apply_counts(w_OI.to(x.dtype), rank_OI, count_O)
        wants_w, wants_beta = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        if not (wants_w or wants_beta):
            return gradient_x, None, None, None, None, None
        x_NI, gradient_NO = x.flatten(0, -2), gradient_y.flatten(0, -2)
        dtype = torch.promote_types(torch.float32, w_OI.dtype)
        gradient_w = torch.empty_like(w_OI) if wants_w else None
        curves = []
        for rows in row_chunks(w_OI, _FEWEST_ROWS):
            gradient_RC = (gradient_NO[:, rows].T @ x_NI).to(dtype)
            if gradient_w is not None:
                gradient_w[rows] = apply_counts(gradient_RC, rank_OI[rows], count_O[rows])
            if wants_beta:
                product_RC = gradient_RC.mul_(w_OI[rows])
                curves.append(removal_curve(product_RC, rank_OI[rows], counts_D))
        gradient_GD = None
        if wants_beta:
            distributions, beta_dtype = ctx.beta
            curve_OD = torch.cat(curves).neg_()
            curve_GRD = curve_OD.view(distributions, -1, curve_OD.shape[1])
            gradient_GD = curve_GRD.sum(1).to(beta_dtype)
        return gradient_x, gradient_w, None, None, gradient_GD, None


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
