"""What each width of each sub-block costs the model: local losses, scaled by sub-models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.shrinking.units import Width
from secateur.shrinking.widths import nested_places
from secateur.solvers.utility import fit_with_prior

# Least coefficient, of the typical one: nothing is free, whatever noise says.
_FLOOR = 0.1


@dataclass(frozen=True)
class Penalties:
    """Divergence from the dense model that widths are expected to cause.

    Attributes:
        nats: of each sub-block and each width of its grid, nats per token; they add up. Infinite
            for widths behind the narrowest that was tried: of them nothing is known.
        explained: share of the variance of the sub-models' divergences that the fit to all others
            foretells; None if they do not differ.
    """

    nats: list[list[float]]
    explained: float | None


def fit_penalties(
    grids: Sequence[Sequence[Width]],
    losses: Sequence[Sequence[float]],
    tried: Sequence[Sequence[int]],
    divergences: Sequence[float],
) -> Penalties:
    """Regress divergences on local losses.

    A sub-block has two coefficients, nats per local loss: one of its narrower widths, one for all
    of it being gone, which is more than the sum of its parts. All are expected to be alike, as far
    as sub-models do not say otherwise. A width never costs less than one that it is part of.

    Args:
        grids: widths of each sub-block, rising from none.
        losses: local loss of each of them.
        tried: for each sub-model the place in each sub-block's grid.
        divergences: of each sub-model; infinite ones count as the furthest finite one.
    """
    design_NK = torch.tensor([_row(losses, row) for row in tried], dtype=torch.float64)
    divergence_N = torch.tensor(divergences, dtype=torch.float64)
    ones_K = torch.ones(design_NK.shape[1], dtype=torch.float64)
    fit = fit_with_prior(design_NK, divergence_N, ones_K, intercept=False)
    coefficient_K = fit.coefficients_M
    typical = coefficient_K.median().clamp_min(torch.finfo(coefficient_K.dtype).tiny)
    coefficient_SK = coefficient_K.clamp_min(_FLOOR * typical).view(-1, 2).tolist()
    nats = []
    for place, (grid, loss, pair) in enumerate(zip(grids, losses, coefficient_SK, strict=True)):
        least = min((row[place] for row in tried if row[place]), default=len(grid) - 1)
        priced = _nested_prices(grid, loss, *pair)
        priced[1:least] = [math.inf] * len(priced[1:least])
        nats.append(priced)
    return Penalties(nats, _explained(divergence_N, fit.left_out_N))


def _row(losses: Sequence[Sequence[float]], places: Sequence[int]) -> list[float]:
    row = []
    for loss, place in zip(losses, places, strict=True):
        row += [loss[place], 0.0] if place else [0.0, loss[place]]
    return row


def _nested_prices(
    grid: Sequence[Width], loss: Sequence[float], partial: float, gone: float
) -> list[float]:
    """Penalties of all widths, each raised to the highest of those that contain it."""
    priced = np.array([loss[0] * gone, *(each * partial for each in loss[1:])])
    places_QU = nested_places(grid)[::-1, ::-1]
    highest_QU = np.maximum.accumulate(np.maximum.accumulate(priced[places_QU], axis=0), axis=1)
    priced[places_QU] = highest_QU
    priced[0] = priced.max()
    found: list[float] = priced.tolist()
    return found


def _explained(divergence_N: Tensor, left_out_N: Tensor) -> float | None:
    finite_N = divergence_N.isfinite()
    spread = float(divergence_N[finite_N].var(correction=0))
    return 1 - float(left_out_N[finite_N].square().mean()) / spread if spread else None
