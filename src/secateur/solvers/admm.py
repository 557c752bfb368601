"""ADMM: choose the mask and the weights together (ALPS, Meng et al. 2024, arXiv 2406.07831)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.patterns.pattern import Budget, Scope, select
from secateur.solvers.gram import (
    SparseSolution,
    check_finite,
    damped_cholesky,
    live_columns,
    normalised_gram,
)
from secateur.solvers.refit import masked_conjugate_gradients

# With the Gram matrix scaled to a unit diagonal, the penalty ρ grows geometrically from where the
# mask still moves freely to where it has settled.
_FIRST_PENALTY = 0.15
_LAST_PENALTY = 1.0


def admm(
    w_OI: Tensor,
    gram_II: Tensor,
    budget: Budget,
    *,
    scope: Scope = "row",
    row_zeros: Sequence[int] | None = None,
    damping: float = 0.01,
    iterations: int = 12,
    refit_iterations: int = 15,
) -> SparseSolution:
    """Prune by the alternating direction method of multipliers, then refit on the mask found.

    Inputs are scaled so that the Gram matrix H has a unit diagonal; W are the dense weights. The
    problem is split into unconstrained weights B and sparse weights D, with a scaled dual U
    (eqs. 3-4 of the paper):

        B = (H + ρI)⁻¹ (H W + ρ (D − U)) = W + (D − U − W) ρ (H + ρI)⁻¹
        D = B + U with all but its largest entries set to zero
        U = B + U − D

    The mask of the last D is final; conjugate gradients on it finish the weights, in at most
    ``refit_iterations``. The paper grows ρ by watching the mask. Here ρ grows by a constant factor
    in a fixed number of ``iterations``, each one product of the weights' size and one inverse of
    the Gram matrix's size. ``scope`` and ``row_zeros`` are those of `select`.
    """
    budget.check_fits(*w_OI.shape)
    check_finite("the weights", w_OI)
    check_finite("the Gram matrix's entries", gram_II)
    live_I = live_columns(gram_II)
    scaled_II, scale_I = normalised_gram(gram_II, damping)
    dense_OI = w_OI * (scale_I * live_I)

    mask_OI = select(dense_OI.abs(), budget, scope, row_zeros)
    sparse_OI = dense_OI.masked_fill(~mask_OI, 0)
    dual_OI = dense_OI - sparse_OI
    growth = (_LAST_PENALTY / _FIRST_PENALTY) ** (1 / max(iterations - 1, 1))
    penalty = _FIRST_PENALTY
    notes: list[str] = []
    for step in range(iterations):
        if step:
            penalty *= growth
            dual_OI /= growth
        factor = damped_cholesky(scaled_II, penalty)
        notes += [note for note in factor.notes if note not in notes]
        pull_II = torch.cholesky_inverse(factor.lower_II).mul_(factor.damping)
        free_OI = torch.addmm(dense_OI, sparse_OI.sub_(dual_OI).sub_(dense_OI), pull_II)
        free_OI += dual_OI
        mask_OI = select(free_OI.abs(), budget, scope, row_zeros)
        sparse_OI = free_OI.masked_fill(~mask_OI, 0)
        dual_OI = free_OI.sub_(sparse_OI)

    fitted_OI = masked_conjugate_gradients(
        scaled_II, dense_OI, sparse_OI, mask_OI, iterations=refit_iterations, tolerance=1e-3
    )
    # Inputs that are always zero say nothing about their weights: those kept stay as they were.
    fitted_OI = torch.where(live_I, fitted_OI.div_(scale_I), w_OI).masked_fill_(~mask_OI, 0)
    return SparseSolution(fitted_OI, mask_OI, tuple(notes))
