"""Fit a cut output matrix on some tokens, and decide on others how far to trust the fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.solvers.ridge import cut_loss, ridge_refit

# Pulls towards the old weights to choose from, as fractions of the mean diagonal.
_DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class OutputFit:
    """What became of an output matrix.

    Attributes:
        v_OK: for the kept columns, fp32.
        changed: whether it is anything but the old columns.
        loss: squared change of the output per held-out token.
        plain_loss: the same with the old columns.
    """

    v_OK: Tensor
    changed: bool
    loss: float
    plain_loss: float


def fit_output(
    w_OI: Tensor,
    fitted_II: Tensor,
    held_out_II: Tensor,
    kept_K: Tensor,
    dtype: torch.dtype = torch.float32,
) -> OutputFit:
    """Refit the kept columns with the damping that held-out tokens like best, if any helps.

    Args:
        w_OI: dense output matrix, fp32.
        fitted_II: mean of x xᵀ over the tokens to fit to.
        held_out_II: the same over others.
        kept_K: columns that are left; may be none.
        dtype: of the file, to which new weights are rounded.
    """
    plain_OK = w_OI[:, kept_K]
    plain = float(cut_loss(w_OI, plain_OK, kept_K, held_out_II))
    best = OutputFit(plain_OK, False, plain, plain)
    last = float("inf")
    for damping in _DAMPINGS if len(kept_K) else ():
        v_OK = ridge_refit(w_OI, fitted_II, kept_K, damping).to(dtype).float()
        loss = float(cut_loss(w_OI, v_OK, kept_K, held_out_II))
        if loss < best.loss:
            best = OutputFit(v_OK, True, loss, plain)
        if loss > last:
            break
        last = loss
    return best
