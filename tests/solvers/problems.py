"""Layer problems of the kind that language models pose."""

from __future__ import annotations

import torch
from torch import Tensor


def make_problem(
    rows: int = 24,
    width: int = 48,
    tokens: int = 400,
    seed: int = 0,
    dead: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return dense weights w_OI and the gram_II of correlated inputs with outlier columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale_I = 10 ** (normal(width) / 2)
    mixing_II = torch.eye(width, dtype=torch.float64) + normal(width, width) / width**0.5
    x_NI = normal(tokens, width) @ mixing_II * scale_I
    x_NI[:, list(dead)] = 0
    w_OI = normal(rows, width) / width**0.5
    gram_II = x_NI.T @ x_NI / tokens
    return w_OI.to(dtype), gram_II.to(dtype)


def quadratic_error(delta_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Mean squared change of each output over calibration tokens: δ G δᵀ for each row δ."""
    return torch.linalg.vecdot(delta_OI @ gram_II, delta_OI)


def predicted_change(
    delta_OI: Tensor, gradient_OI: Tensor, gram_II: Tensor, curvature_O: Tensor
) -> Tensor:
    """Change of a quadratic error by each row, ⟨g, Δ⟩ + ½ b Δ A Δᵀ; (out,)."""
    slope_OI = torch.addmm(gradient_OI, delta_OI * (0.5 * curvature_O[:, None]), gram_II)
    change_O: Tensor = torch.linalg.vecdot(slope_OI, delta_OI)
    return change_O
