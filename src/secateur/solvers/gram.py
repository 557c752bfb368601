"""Gram matrices of inputs, singular or not: what is in them, their scale, their factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.runs.errors import SecateurError

# Fractions of the mean diagonal to fall back to, the last of them certain to be enough.
_FALLBACKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Fractions that are tried before float64 is.
_SAME_DTYPE = 4
# A pivot below this many roundings of its diagonal entry is noise.
_NOISE = 8


@dataclass(frozen=True)
class SparseSolution:
    """Pruned weights of stacked linears.

    Attributes:
        w_OI: Weights, exactly zero outside the mask.
        mask_OI: bool, True = kept.
        notes: Fallbacks that were needed, one sentence each.
    """

    w_OI: Tensor
    mask_OI: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cholesky:
    """A factor and what it took to get it.

    Attributes:
        lower_II: L with L Lᵀ = G + damping · mean(diag G) · I; dead columns are independent.
        damping: Fraction of the mean diagonal over live columns that was added.
        notes: One sentence for each departure from what was asked for.
    """

    lower_II: Tensor
    damping: float
    notes: tuple[str, ...] = ()


def check_finite(name: str, values: Tensor) -> None:
    """Raise SecateurError if a tensor holds NaN or infinity."""
    if values.numel() and not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
        raise SecateurError(
            f"{name} hold NaN or infinite values; check the checkpoint and the calibration dtype"
        )


def live_columns(gram_II: Tensor) -> Tensor:
    """bool (I,): inputs that are not zero on every calibration token; the others are dead."""
    return gram_II.diagonal() > 0


def mean_diagonal(gram_II: Tensor) -> Tensor:
    """Mean over live columns, 1 if there are none; 0-d tensor."""
    live_I = live_columns(gram_II)
    total = gram_II.diagonal().where(live_I, 0).sum()
    return torch.where(live_I.any(), total / live_I.sum().clamp_min(1), 1)


def normalised_gram(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Scale G + damping · mean(diag G) · I to a unit diagonal.

    Returns:
        The scaled matrix, and scale_I: weights times it are the unknowns of the scaled problem.
        Dead columns become independent, whatever the damping.
    """
    mean = mean_diagonal(gram_II)
    diagonal_I = gram_II.diagonal() / mean + damping
    diagonal_I = torch.where(live_columns(gram_II), diagonal_I, max(damping, 1.0))
    scale_I = diagonal_I.sqrt()
    scaled_II = gram_II / mean
    scaled_II /= scale_I
    scaled_II /= scale_I[:, None]
    scaled_II.diagonal().fill_(1)
    return scaled_II, scale_I


def damped_cholesky(gram_II: Tensor, damping: float) -> Cholesky:
    """Factor G + damping · mean(diag G) · I; dead columns get the mean as their diagonal.

    If the sum is not safely positive definite, the damping grows about tenfold a few times; then
    the same is tried in float64. A positive semidefinite matrix of finite numbers always gets a
    factor.

    Args:
        gram_II: Symmetric positive semidefinite.
        damping: Fraction of the mean diagonal over live columns, not negative.

    Raises:
        SecateurError: The matrix is not finite, or far from positive semidefinite.
    """
    check_finite("the Gram matrix's entries", gram_II)
    ladder = (damping, *(fraction for fraction in _FALLBACKS if fraction > damping))
    attempts = [(gram_II.dtype, fraction) for fraction in ladder[:_SAME_DTYPE]]
    attempts += [(torch.float64, fraction) for fraction in ladder]
    mean = mean_diagonal(gram_II)
    for dtype, fraction in attempts:
        # Dividing by the mean keeps inputs of any scale inside the range of the dtype.
        damped_II = (gram_II / mean).to(dtype)
        damped_II.diagonal().add_((~live_columns(gram_II)).to(dtype) + fraction)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        noise_I = damped_II.diagonal() * (_NOISE * torch.finfo(dtype).eps)
        if bool((failed == 0) & (lower_II.diagonal().square() > noise_I).all()):
            break
    else:
        raise SecateurError(
            "a Gram matrix is not positive semidefinite; check the calibration statistics"
        )
    notes = []
    if fraction != damping:
        notes.append(f"damping raised from {damping:g} to {fraction:g}: singular Gram matrix")
    if dtype != gram_II.dtype:
        notes.append("factored the Gram matrix in float64")
    lower_II = (lower_II * mean.to(dtype).sqrt()).to(gram_II.dtype)
    return Cholesky(lower_II, fraction, tuple(notes))
