"""What layer-wise solvers minimise: the squared change of a linear's output."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError


def quadratic_error(delta_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Mean squared change of each output over calibration tokens, δ G δᵀ for each row δ.

    Divide by the same of the dense weights for a relative error.

    Args:
        delta_OI: Change of the weights.
        gram_II: XᵀX / N of the inputs.

    Returns:
        error_O, not negative.
    """
    error_O: Tensor = torch.linalg.vecdot(delta_OI @ gram_II, delta_OI)
    return error_O.clamp_min_(0)


def check_finite(name: str, values: Tensor) -> None:
    """Raise SecateurError if a tensor holds NaN or infinity."""
    if values.numel() and not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
        raise SecateurError(
            f"{name} hold NaN or infinite values; check the checkpoint and the calibration dtype"
        )
