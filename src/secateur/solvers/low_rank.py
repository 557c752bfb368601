"""The best low-rank stand-in for a matrix, as inputs see it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.damping import damped_cholesky

_DAMPING = 1e-3


def low_rank_fit(residual_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Minimise E‖(R − S·X)·x‖² over matrices of a rank.

    With G = E x xᵀ = L Lᵀ it is the truncated singular value decomposition of R·L, taken back by
    L⁻¹ (Eckart and Young in the metric of G). Each factor gets the root of the singular values.

    Args:
        residual_OI: R, fp32.
        gram_II: G, fp32, positive semidefinite.
        rank: what is beyond that of R is filled with zeros.

    Returns:
        s_OR and x_RI.
    """
    lower_II = damped_cholesky(gram_II, _DAMPING).lower_II.to(residual_OI.dtype)
    u_OK, value_K, v_KI = torch.linalg.svd(residual_OI @ lower_II, full_matrices=False)
    kept = min(rank, len(value_K))
    root_K = value_K[:kept].sqrt()
    s_OR = residual_OI.new_zeros(len(residual_OI), rank)
    x_RI = residual_OI.new_zeros(rank, residual_OI.shape[1])
    s_OR[:, :kept] = u_OK[:, :kept] * root_K
    scaled_KI = root_K[:, None] * v_KI[:kept]
    x_RI[:kept] = torch.linalg.solve_triangular(lower_II, scaled_KI, upper=False, left=False)
    return s_OR, x_RI
