"""Distance of a block's outputs from a reference, by token or by feature."""

from __future__ import annotations

import torch
from torch import Tensor

# The least squared norm that is divided by: a state may be all zeros.
_SMALLEST = 1e-12
# Weight of a relative change of a hidden state's length.
_LENGTH = 0.1


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Squared error of every token's output over its squared norm.

    A few tokens with huge outputs would hide all others in a sum.

    Args:
        y: (…, H).
        target: Same shape.

    Returns:
        (…).
    """
    return (y - target).square().sum(-1) / _square(target)


def state_error(y: Tensor, target: Tensor) -> Tensor:
    """Error of every token's hidden state y against o, its direction more than its length.

        ‖y/‖y‖ − o/‖o‖‖² + 0.1 (‖y‖/‖o‖ − 1)²

    Pruned blocks answer too faintly, and longer outputs are the cheapest way to lower a relative
    error. But what follows a block normalises each token by itself, so the length only sets how
    much the next blocks add to the state.

    Args:
        y: Hidden states (…, H).
        target: Same shape.

    Returns:
        (…); 0 where they are equal.
    """
    ratio = (_square(y) / _square(target)).sqrt()
    # As a difference, not as 1 − cosine, which would leave few digits.
    turned = relative_error(y / ratio[..., None], target)
    return turned + _LENGTH * (ratio - 1).square()


def relative_loss(output: Tensor, reference: Tensor) -> Tensor:
    """Mean over features of the relative squared error of each.

        (1/H) Σ_h Σ_t (reference_th − output_th)² / Σ_t reference_th²

    This is the reconstruction loss of BESA as it was released (arXiv 2402.16880; the paper prints
    it without the normalisation). Rescaling a feature in both tensors changes nothing. A feature
    whose reference is zero on all tokens has no relative error and counts as 0.

    Args:
        output: (…, H).
        reference: Same shape.

    Returns:
        Scalar, fp32 or float64.
    """
    square_H = _wide(reference).square().sum(dim=tuple(range(reference.ndim - 1)))
    tiny = torch.finfo(square_H.dtype).tiny
    inverse_H = torch.where(square_H > tiny, 1 / square_H.clamp_min(tiny), 0)
    error_H = (_wide(output) - _wide(reference)).square().flatten(0, -2).sum(0)
    return torch.dot(error_H, inverse_H) / len(inverse_H)


def _square(states: Tensor) -> Tensor:
    return states.square().sum(-1).clamp_min(_SMALLEST)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(torch.float32, values.dtype))
