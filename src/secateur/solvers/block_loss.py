"""Distance of a block's outputs from a reference, relative in each feature."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_square_norms(reference: Tensor) -> Tensor:
    """1 / Σ_t reference_th² over all tokens, for each feature h; 0 where a feature is zero.

    Args:
        reference: (…, H).

    Returns:
        (H,), fp32 or float64.
    """
    square_H = _wide(reference).square().sum(dim=tuple(range(reference.ndim - 1)))
    tiny = torch.finfo(square_H.dtype).tiny
    return torch.where(square_H > tiny, 1 / square_H.clamp_min(tiny), 0)


def relative_loss(
    output: Tensor, reference: Tensor, inverse_square_H: Tensor | None = None
) -> Tensor:
    """Mean over features of the relative squared error of each.

        (1/H) Σ_h Σ_t (reference_th − output_th)² / Σ_t reference_th²

    the reconstruction loss of BESA as it was released (arXiv 2402.16880; the paper prints it
    without the normalisation). Rescaling a feature in both tensors changes nothing. A feature
    whose reference is zero on all tokens has no relative error and counts as 0.

    Args:
        output: (…, H).
        reference: Same shape.
        inverse_square_H: Norms from more tokens than these (``inverse_square_norms``); by default
            those of ``reference``.

    Returns:
        Scalar, fp32 or float64.
    """
    if inverse_square_H is None:
        inverse_square_H = inverse_square_norms(reference)
    error = (_wide(output) - _wide(reference)).square().flatten(0, -2).sum(0)
    return torch.dot(error, inverse_square_H) / len(inverse_square_H)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(torch.float32, values.dtype))
