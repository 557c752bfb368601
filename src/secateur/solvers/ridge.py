"""Closed-form fits of a matrix as its inputs see it: on fewer columns, or of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.gram import check_finite, damped_cholesky, mean_diagonal, normalised_gram

# Damping of the Gram matrix under a low-rank fit.
_LOW_RANK_DAMPING = 1e-3


def ridge_refit(
    w_OI: Tensor,
    gram_II: Tensor,
    kept_K: Tensor,
    damping: float = 0.01,
    target_IO: Tensor | None = None,
) -> Tensor:
    """Least squares for the kept columns, pulled towards their old weights; returns v_OK.

        V_S = (T_S + λ W_S) (G_SS + λI)⁻¹ = W_S + (T_S − W_S G_SS) (G_SS + λI)⁻¹,

    λ = damping · mean(diag G), T = W G by default: the matrix is to keep its output. The change is
    what is computed, so weights stay where no output is missing. V_S minimises the squared error
    plus λ ‖V_S − W_S‖², hence its error is never above that of W_S. Columns that are zero on all
    tokens keep their weights.

    Args:
        w_OI: Dense output matrix.
        gram_II: Of its input; a sum over tokens will do.
        kept_K: Indices of the columns that are left, in the order they are wanted.
        damping: Pull towards the old weights.
        target_IO: XᵀY of outputs Y other than X Wᵀ, divided as the Gram matrix is: T's transpose.
            With Y the dense output less the pruned stream before this matrix, the refit also makes
            up for earlier losses.
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

    ``v_OK`` are the kept columns of the dense ``w_OI``, refitted, and ``kept_K`` their indices.
    With the Gram matrix of tokens that were not fitted to it is the held-out error.
    """
    change_OI = _change(w_OI, v_OK, kept_K)
    return (change_OI @ gram_II).mul_(change_OI).sum()


def output_bias(w_OI: Tensor, v_OK: Tensor, kept_K: Tensor, mean_I: Tensor) -> Tensor:
    """The bias_O that, added to the bias there is, gives the output its old mean.

    Without a refit it is the removed columns times the mean of their inputs (FLAP, An et al.
    2023, arXiv 2312.11983). A refit on the centred Gram matrix G − μμᵀ together with
    this bias is least squares with an intercept. Arguments as for ``cut_loss``.
    """
    return _change(w_OI, v_OK, kept_K) @ mean_I


def low_rank_fit(residual_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Minimise E‖(R − S·X)·x‖² over matrices S·X of a rank; returns s_OR and x_RI.

    With G = E x xᵀ = L Lᵀ it is the truncated singular value decomposition of R·L, multiplied by
    L⁻¹ (Eckart and Young in the metric of G). Each factor gets the root of the singular values.
    Where ``rank`` is more than R has, the rest is zeros.
    """
    lower_II = damped_cholesky(gram_II, _LOW_RANK_DAMPING).lower_II.to(residual_OI.dtype)
    u_OK, value_K, v_KI = torch.linalg.svd(residual_OI @ lower_II, full_matrices=False)
    kept = min(rank, len(value_K))
    root_K = value_K[:kept].sqrt()
    s_OR = residual_OI.new_zeros(len(residual_OI), rank)
    x_RI = residual_OI.new_zeros(rank, residual_OI.shape[1])
    s_OR[:, :kept] = u_OK[:, :kept] * root_K
    scaled_KI = root_K[:, None] * v_KI[:kept]
    x_RI[:kept] = torch.linalg.solve_triangular(lower_II, scaled_KI, upper=False, left=False)
    return s_OR, x_RI


def _change(w_OI: Tensor, v_OK: Tensor, kept_K: Tensor) -> Tensor:
    return w_OI.index_add(1, kept_K, v_OK, alpha=-1)
