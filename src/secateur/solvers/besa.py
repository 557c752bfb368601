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

Masked weights have the rates' gradient only. The weights themselves are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.solvers.chunks import row_chunks
from secateur.solvers.rates import rows_per_distribution

# The widest row whose ranks, and number of zeros, int16 holds.
_WIDEST_INT16 = 2**15 - 1

# Fewer rows than this make matrix products slow.
_FEWEST_ROWS = 128


class Surrogate(Protocol):
    """What stands in for the derivative of a mask."""

    def __call__(self, product_RC: Tensor, rank_RC: Tensor, count_R: Tensor) -> Tensor:
        """Derivative of the loss for each row.

        Args:
            product_RC: W · ∂L/∂Ŵ of some rows, fp32 or float64.
            rank_RC: Their ranks.
            count_R: Their zeros.

        Returns:
            A tensor whose first dimension is the rows.
        """
        ...


@dataclass(frozen=True)
class CandidateSurrogate:
    """The paper's: ∂L/∂beta_rd = −A_rd, for a distribution over candidate rates.

    Attributes:
        counts_D: Weights that each candidate removes, int64, on the weights' device.
    """

    counts_D: Tensor

    def __call__(self, product_RC: Tensor, rank_RC: Tensor, count_R: Tensor) -> Tensor:
        return removal_curve(product_RC, rank_RC, self.counts_D).neg_()


@dataclass(frozen=True)
class WindowSurrogate:
    """For one rate per row: ∂L/∂k_r, the slope of −A_r around k_r (``window_slope``).

    Attributes:
        half_width: Ranks on either side of k_r, at least 1.
    """

    half_width: int

    def __post_init__(self) -> None:
        if self.half_width < 1:
            raise SecateurError(
                f"a window of {self.half_width} ranks holds no weight; give at least 1"
            )

    def __call__(self, product_RC: Tensor, rank_RC: Tensor, count_R: Tensor) -> Tensor:
        return window_slope(product_RC, rank_RC, count_R, self.half_width)


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


def window_slope(product_RC: Tensor, rank_RC: Tensor, count_R: Tensor, half_width: int) -> Tensor:
    """Change of the loss per additional zero of each row, from a window around its count.

    With A_r(k) = Σ_{rank < k} W · ∂L/∂Ŵ, the first-order change of the loss on going from k to k'
    zeros is −(A_r(k') − A_r(k)). The slope is its central difference

        ∂L/∂k_r ≈ −(A_r(b) − A_r(a)) / (b − a),   a = max(k_r − h, 0),  b = min(k_r + h, C),

    that is, minus the mean of W · ∂L/∂Ŵ over the h ranks that would go next and the h that would
    come back first. It is the paper's expected linearised loss, differentiated with respect to
    the position of a uniform distribution over [k_r − h, k_r + h], instead of with respect to 101
    probabilities. The window is centred for a reason: a weight's own curvature, ½ W² H, raises
    the loss both when it goes and when it comes back, so it cancels between the two halves but
    for the growth of scores along the window, whereas it would dominate a one-sided difference.

    Args:
        product_RC: W · ∂L/∂Ŵ.
        rank_RC: Ranks.
        count_R: Zeros of each row.
        half_width: h, at least 1; wider windows have less noise, and less of the local slope.

    Returns:
        slope_R.
    """
    columns = product_RC.shape[1]
    low_R = (count_R - half_width).clamp(0, columns)
    high_R = (count_R + half_width).clamp(0, columns)
    low_R1, high_R1 = (bound.to(rank_RC.dtype)[:, None] for bound in (low_R, high_R))
    # −1 inside, 0 outside.
    inside_RC = (rank_RC - high_R1).clamp_(-1, 0).sub_((rank_RC - low_R1).clamp_(-1, 0))
    total_R = torch.linalg.vecdot(product_RC, inside_RC.to(product_RC.dtype))
    slope_R: Tensor = total_R / (high_R - low_R)
    return slope_R


def masked_weight(
    w_OI: Tensor, rank_OI: Tensor, count_O: Tensor, carrier_G: Tensor, surrogate: Surrogate
) -> Tensor:
    """Masked copy of the weights whose gradient goes to ``carrier_G``.

    Args:
        w_OI: Frozen weights, finite.
        rank_OI: Their ranks.
        count_O: Zeros of each row, integers in [0, columns].
        carrier_G: What the surrogate's derivative belongs to; each of its G entries serves O / G
            consecutive rows, whose derivatives are added. Its value is not used: the counts say
            what it amounts to. For ``CandidateSurrogate`` beta_GD, for ``WindowSurrogate`` the
            rate times the columns, (G,). Zeros of shape (O, D) collect the curves −A_rd
            of all rows in their ``grad``.
        surrogate: The derivative.

    Returns:
        Weights of shape (O, I), for `torch.func.functional_call` or the like.

    Raises:
        SecateurError: G does not divide the rows.
    """
    rows_per_distribution(len(w_OI), len(carrier_G))
    apply: Callable[..., Tensor] = _MaskedWeight.apply
    return apply(w_OI, rank_OI, count_O, carrier_G, surrogate)


def masked_linear(
    x: Tensor,
    w_OI: Tensor,
    rank_OI: Tensor,
    count_O: Tensor,
    carrier_G: Tensor,
    surrogate: Surrogate,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x Ŵᵀ + b with Ŵ = ``masked_weight(…)``, in less memory.

    Neither masked weights nor their gradient outlive a call: the former are made again in the
    backward pass, of the latter there are a few rows at a time. Under autocast the product is in
    autocast's dtype.

    Args:
        x: Inputs, (…, I).
        w_OI: As in ``masked_weight``, like the four arguments after it.
        rank_OI: Ranks.
        count_O: Zeros of each row.
        carrier_G: What the gradient is handed to.
        surrogate: The derivative.
        bias_O: Added to the output.

    Returns:
        Outputs, (…, O).
    """
    rows_per_distribution(len(w_OI), len(carrier_G))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    apply: Callable[..., Tensor] = _MaskedLinear.apply
    y = apply(x, w_OI, rank_OI, count_O, carrier_G, surrogate)
    return y if bias_O is None else y + bias_O.to(y.dtype)


class _MaskedWeight(Function):
    @staticmethod
    def forward(
        ctx: Any, w_OI: Tensor, rank_OI: Tensor, count_O: Tensor, carrier_G: Tensor, surrogate: Any
    ) -> Tensor:
        ctx.save_for_backward(w_OI, rank_OI, count_O)
        ctx.surrogate, ctx.carrier = surrogate, (len(carrier_G), carrier_G.dtype)
        return apply_counts(w_OI, rank_OI, count_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w_OI, rank_OI, count_O = ctx.saved_tensors
        (gradient_OI,) = gradients
        dtype = torch.promote_types(torch.float32, w_OI.dtype)
        derivative = torch.cat(
            [
                ctx.surrogate(
                    gradient_OI[rows].to(dtype) * w_OI[rows], rank_OI[rows], count_O[rows]
                )
                for rows in row_chunks(w_OI)
            ]
        )
        return None, None, None, _share(derivative, *ctx.carrier), None


class _MaskedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_OI: Tensor,
        rank_OI: Tensor,
        count_O: Tensor,
        carrier_G: Tensor,
        surrogate: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, w_OI, rank_OI, count_O)
        ctx.surrogate, ctx.carrier = surrogate, (len(carrier_G), carrier_G.dtype)
        return functional.linear(x, apply_counts(w_OI.to(x.dtype), rank_OI, count_O))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, rank_OI, count_O = ctx.saved_tensors
        (gradient_y,) = gradients
        gradient_x = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient_y @ apply_counts(w_OI.to(x.dtype), rank_OI, count_O)
        if not ctx.needs_input_grad[4]:
            return gradient_x, None, None, None, None, None
        x_NI, gradient_NO = x.flatten(0, -2), gradient_y.flatten(0, -2)
        dtype = torch.promote_types(torch.float32, w_OI.dtype)
        derivative = torch.cat(
            [
                ctx.surrogate(
                    (gradient_NO[:, rows].T @ x_NI).to(dtype).mul_(w_OI[rows]),
                    rank_OI[rows],
                    count_O[rows],
                )
                for rows in row_chunks(w_OI, _FEWEST_ROWS)
            ]
        )
        return gradient_x, None, None, None, _share(derivative, *ctx.carrier), None


def _share(derivative: Tensor, distributions: int, dtype: torch.dtype) -> Tensor:
    """Add what belongs to the rows that share an entry of the carrier."""
    shared = rows_per_distribution(len(derivative), distributions)
    return derivative.view(distributions, shared, *derivative.shape[1:]).sum(1).to(dtype)
