"""Refit of an output matrix to the columns that are left, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.damping import damped_cholesky, mean_diagonal
from secateur.solvers.finite import check_finite
from secateur.solvers.refit import normalised_gram


def ridge_refit(
    w_OI: Tensor,
    gram_II: Tensor,
    kept_K: Tensor,
    damping: float = 0.01,
    target_IO: Tensor | None = None,
) -> Tensor:
    """Least squares for the kept columns, pulled towards their old weights.

        V_S = (T_S + λ W_S) (G_SS + λI)⁻¹ = W_S + (T_S − W_S G_SS) (G_SS + λI)⁻¹,

    λ = damping · mean(diag G), T = W G by default: the matrix is to keep its output. What is
    computed is the change, so nothing moves where there is nothing to make up for. V_S minimises
    the squared error plus λ ‖V_S − W_S‖², hence its error is never above that of W_S.

    Columns that are zero on all tokens keep their weights.

    Args:
        w_OI: Dense output matrix, fp32 or float64.
        gram_II: XᵀX / N of its input, or the sum, in the same dtype; may be singular.
        kept_K: Indices of the columns that are left, in the order they are wanted.
        damping: Pull towards the old weights, as a fraction of the mean diagonal.
        target_IO: XᵀY of outputs Y other than X Wᵀ, divided as the Gram matrix is: T's transpose.
            With Y the dense output less the pruned stream before this matrix, it also makes up
            for what was lost earlier.

    Returns:
        v_OK.

    Raises:
        SecateurError: Weights, Gram matrix or target are not finite.
    """
    check_finite("the weights", w_OI)
    check_finite("the Gram matrix's entries", gram_II)
    if target_IO is None:
        removed_OI = w_OI.index_fill(1, kept_K, 0)
        missing_KO = gram_II[kept_K] @ removed_OI.T
    else:
        check_finite("the products of inputs and targets", target_IO)
        missing_KO = target_IO[kept_K] - gram_II[kept_K][:, kept_K] @ w_OI[:, kept_K].T
    scaled_II, scale_I = normalised_gram(gram_II, damping)
    scale_K1 = scale_I[kept_K, None]
    lower_KK = damped_cholesky(scaled_II[kept_K][:, kept_K], 0.0).lower_II
    missing_KO = missing_KO / mean_diagonal(gram_II) / scale_K1
    change_KO = torch.cholesky_solve(missing_KO, lower_KK) / scale_K1
    return w_OI[:, kept_K] + change_KO.T


def cut_loss(w_OI: Tensor, v_OK: Tensor, kept_K: Tensor, gram_II: Tensor) -> Tensor:
    """Squared change of the output, summed over rows, in the unit of the Gram matrix; 0-d.

    With the Gram matrix of tokens that were not fitted to it is the held-out error.

    Args:
        w_OI: Dense output matrix.
        v_OK: What is left of it.
        kept_K: Which columns those are.
        gram_II: XᵀX of the input.
    """
    change_OI = _change(w_OI, v_OK, kept_K)
    return (change_OI @ gram_II).mul_(change_OI).sum()


def output_bias(w_OI: Tensor, v_OK: Tensor, kept_K: Tensor, mean_I: Tensor) -> Tensor:
    """The bias that gives the output its old mean.

    Without a refit it is the removed columns times the mean of their inputs (FLAP, An et al.
    2023, arXiv 2312.11983). A refit on the centred Gram matrix G − μμᵀ together with
    this bias is least squares with an intercept.

    Args:
        w_OI: Dense output matrix.
        v_OK: What is left of it.
        kept_K: Which columns those are.
        mean_I: Mean of the input over tokens.

    Returns:
        bias_O, to be added to the bias there is.
    """
    return _change(w_OI, v_OK, kept_K) @ mean_I


def _change(w_OI: Tensor, v_OK: Tensor, kept_K: Tensor) -> Tensor:
    return w_OI.index_add(1, kept_K, v_OK, alpha=-1)
