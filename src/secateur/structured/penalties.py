"""What each width of each sub-block costs the model: local losses, scaled by sub-models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from secateur.solvers.utility import fit_with_prior

# Least coefficient, of the typical one: nothing is free, whatever noise says.
_FLOOR = 0.1


@dataclass(frozen=True)
class Penalties:
    """Divergence from the dense model that widths are expected to cause.

    Attributes:
        nats: of each sub-block and each width of its grid, nats per token; they add up. Infinite
            for widths narrower than any that was tried: of them nothing is known.
        explained: share of the variance of the sub-models' divergences that the fit to all others
            foretells; None if they do not differ.
    """

    nats: list[list[float]]
    explained: float | None


def fit_penalties(
    grids: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    widths: Sequence[Sequence[int]],
    divergences: Sequence[float],
) -> Penalties:
    """Regress divergences on local losses.

    A sub-block has two coefficients, nats per local loss: one of its narrower widths, one for all
    of it being gone, which is more than the sum of its parts. All are expected to be alike, as far
    as sub-models do not say otherwise. What a sub-block costs never falls with its width.

    Args:
        grids: widths of each sub-block, rising from none.
        losses: local loss of each of them.
        widths: units that each sub-model keeps of each sub-block.
        divergences: of each sub-model; infinite ones count as the furthest finite one.
    """
    design_NK = torch.tensor([_row(grids, losses, row) for row in widths], dtype=torch.float64)
    divergence_N = torch.tensor(divergences, dtype=torch.float64)
    ones_K = torch.ones(design_NK.shape[1], dtype=torch.float64)
    fit = fit_with_prior(design_NK, divergence_N, ones_K, intercept=False)
    coefficient_K = fit.coefficients_M
    typical = coefficient_K.median().clamp_min(torch.finfo(coefficient_K.dtype).tiny)
    coefficient_SK = coefficient_K.clamp_min(_FLOOR * typical).view(-1, 2).tolist()
    nats = []
    for place, (grid, loss, pair) in enumerate(zip(grids, losses, coefficient_SK, strict=True)):
        least = min((row[place] for row in widths if row[place]), default=grid[-1])
        priced = _never_falling(loss, *pair)
        known = (width == 0 or width >= least for width in grid)
        nats.append([n if k else math.inf for n, k in zip(priced, known, strict=True)])
    return Penalties(nats, _explained(divergence_N, fit.left_out_N))


def _row(
    grids: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], widths: Sequence[int]
) -> list[float]:
    row = []
    for grid, loss, width in zip(grids, losses, widths, strict=True):
        local = loss[grid.index(width)]
        row += [local, 0.0] if width else [0.0, local]
    return row


def _never_falling(loss: Sequence[float], partial: float, gone: float) -> list[float]:
    """Penalties of rising widths."""
    priced = [loss[0] * gone, *(each * partial for each in loss[1:])]
    return list(accumulate(reversed(priced), max))[::-1]


def _explained(divergence_N: Tensor, left_out_N: Tensor) -> float | None:
    finite_N = divergence_N.isfinite()
    spread = float(divergence_N[finite_N].var(correction=0))
    return 1 - float(left_out_N[finite_N].square().mean()) / spread if spread else None
