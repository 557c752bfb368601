"""Refit: least squares for the kept weights on a fixed mask, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.gram import check_finite, normalised_gram

# Iterations between two checks of the residual, for which an accelerator has to wait.
_CHECK_EVERY = 5


def refit(
    w_OI: Tensor,
    mask_OI: Tensor,
    gram_II: Tensor,
    *,
    damping: float = 0.01,
    iterations: int = 20,
    tolerance: float = 1e-3,
    start_OI: Tensor | None = None,
) -> Tensor:
    """Fit the kept weights of every row to the dense output.

    Minimises (v − w) (G + damping · mean(diag G) · I) (v − w)ᵀ for each row w over the rows v
    that are zero outside the mask, by conjugate gradients with Jacobi preconditioning. Each row
    has a support of its own: its residual is masked, so all rows share one product with G.
    Every step lowers what is minimised, so no row ends worse than it started.

    Args:
        w_OI: Dense weights.
        mask_OI: True = kept.
        gram_II: Of their inputs.
        damping: Pull towards the dense weights.
        iterations: Most steps.
        tolerance: A row stops when its residual has fallen to this fraction of its first.
        start_OI: Where to start, by default the dense weights; entries outside the mask are
            ignored.

    Returns:
        Weights, exactly zero outside the mask.
    """
    start_OI = (w_OI if start_OI is None else start_OI).masked_fill(~mask_OI, 0)
    check_finite("the weights", w_OI)
    check_finite("the weights to start from", start_OI)
    check_finite("the Gram matrix's entries", gram_II)
    ridge_II, scale_I = normalised_gram(gram_II, damping)
    return masked_conjugate_gradients(
        ridge_II,
        w_OI * scale_I,
        start_OI.mul_(scale_I),
        mask_OI,
        iterations=iterations,
        tolerance=tolerance,
    ).div_(scale_I)


def masked_conjugate_gradients(
    matrix_II: Tensor,
    target_OI: Tensor,
    start_OI: Tensor,
    mask_OI: Tensor,
    *,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Minimise (v − target) A (v − target)ᵀ for each row over v supported on the mask.

    A = ``matrix_II`` is symmetric positive (semi)definite, best with unit diagonal; ``start_OI`` is
    zero outside the mask. A row stops when its residual has fallen to ``tolerance`` of its first.
    """
    mask = mask_OI.to(matrix_II.dtype)
    v_OI = start_OI.clone()
    residual_OI = ((target_OI - start_OI) @ matrix_II).mul_(mask)
    direction_OI = residual_OI.clone()
    norm_O = torch.linalg.vecdot(residual_OI, residual_OI)
    # A row stops at its goal: what is left of its residual is noise.
    goal_O = norm_O * max(tolerance, torch.finfo(matrix_II.dtype).eps) ** 2
    image_OI = torch.empty_like(v_OI)
    for step in range(iterations):
        if step % _CHECK_EVERY == 0 and bool((norm_O <= goal_O).all()):
            break
        torch.mm(direction_OI, matrix_II, out=image_OI)
        curvature_O = torch.linalg.vecdot(direction_OI, image_OI)
        moving_O = (norm_O > goal_O) & (curvature_O > 0)
        length_O1 = torch.where(moving_O, norm_O / curvature_O, 0)[:, None]
        v_OI.addcmul_(direction_OI, length_O1)
        residual_OI.addcmul_(image_OI.mul_(mask), length_O1, value=-1)
        previous_O, norm_O = norm_O, torch.linalg.vecdot(residual_OI, residual_OI)
        turn_O = torch.where(moving_O, norm_O / previous_O, 0)
        direction_OI.mul_(turn_O[:, None]).add_(residual_OI)
    return v_OI
