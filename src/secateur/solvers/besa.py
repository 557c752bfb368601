"""BESA: masks given by a rate per row, and gradients that reach the rates.

Blockwise parameter-efficient sparsity allocation (Xu et al. 2024, arXiv 2402.16880). The weights
of a row are ranked once; a row then loses its k lowest-ranked weights. The mask has no derivative,
so the paper takes that of the probability with which a weight of rank i is pruned when the rate is
drawn from a learned distribution beta over candidates p_d, each of which removes n_d weights:

    ∂L/∂beta_d = −A_d,    A_d = Σ_{rank(i) < n_d} W_i · (∂L/∂Ŵ)_i .

A_d sums over kept and pruned weights alike; −A_d is the first-order change of the loss if the row
went from dense to rate p_d. The released code builds that probability for each weight; here the
backward pass sums W · ∂L/∂Ŵ in the order of ranks, which is the same number, with two bytes per
weight for the ranks and a few rows of temporaries.

Masked weights have the rates' gradient. The weights themselves have one only if they want it, that
of the kept ones: values on a grid whose range is learned along do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from secateur.runs.errors import SecateurError
from secateur.solvers.autocast import apply_linear
from secateur.solvers.chunks import row_chunks
from secateur.solvers.rates import rows_per_distribution

# The widest row whose ranks, and number of zeros, int16 holds.
_WIDEST_INT16 = 2**15 - 1

# Fewer rows than this make matrix products slow.
_FEWEST_ROWS = 128


def ascending_ranks(score_OI: Tensor) -> Tensor:
    """Position of each weight in its row's ascending order of scores; of equal ones, earlier first.

    Args:
        score_OI: Scores, floating point.

    Returns:
        rank_OI, int16 if the row's length fits, else int32.

    Raises:
        SecateurError: A score is NaN.
    """
    if score_OI.numel() and bool(score_OI.amin().isnan()):
        raise SecateurError(
            "a pruning score is NaN; check the weights and the calibration statistics for NaN"
        )
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
    """Copy of the weights, exactly zero (+0) where ``mask_of_counts`` is False.

    Weights must be finite.
    """
    # −1 where the rank is below the count, else 0; small integers are far faster than bool here.
    pruned_OI = (rank_OI - count_O.to(rank_OI.dtype)[:, None]).clamp_(-1, 0)
    return torch.addcmul(w_OI, w_OI, pruned_OI)


def removal_curve(product_RC: Tensor, rank_RC: Tensor, counts_D: Tensor) -> Tensor:
    """A_rd = Σ of the products whose rank is below counts_d.

    Args:
        product_RC: W · ∂L/∂Ŵ.
        rank_RC: Ranks, a permutation in each row.
        counts_D: int64, in any order, from 0 to the number of columns.

    Returns:
        curve_RD.
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

    Neither masked weights nor their gradient outlive a call: the former are made again in the
    backward pass, of the latter there are a few rows at a time. Under autocast the product is in
    autocast's dtype.

    Args:
        x: Inputs, (…, I).
        w_OI: Weights, finite.
        rank_OI: Their ranks.
        count_O: Zeros of each row, integers in [0, I].
        beta_GD: Distributions over candidate rates; each serves O / G consecutive rows. The
            values are not used: the counts say what they amount to. Zeros of shape (O, D) collect
            the curves −A_rd of all rows in their ``grad``.
        counts_D: Weights that each candidate removes, int64, on the weights' device.
        bias_O: Added to the output.

    Returns:
        Outputs, (…, O).

    Raises:
        SecateurError: G does not divide the rows.
    """
    rows_per_distribution(len(w_OI), len(beta_GD))
    return apply_linear(_MaskedLinear, x, w_OI, rank_OI, count_O, beta_GD, counts_D, bias_O=bias_O)


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
            gradient_GD = _share(torch.cat(curves).neg_(), distributions, beta_dtype)
        return gradient_x, gradient_w, None, None, gradient_GD, None


def _share(derivative: Tensor, distributions: int, dtype: torch.dtype) -> Tensor:
    """Add what belongs to the rows that share a distribution."""
    shared = rows_per_distribution(len(derivative), distributions)
    return derivative.view(distributions, shared, *derivative.shape[1:]).sum(1).to(dtype)
