"""Widths that sub-blocks may have, what each costs the model, and which a budget buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from secateur.runs.errors import SecateurError
from secateur.shrinking.units import SubBlock, Width
from secateur.solvers.knapsack import Selection, WidthOptions, width_curve
from secateur.solvers.utility import fit_with_prior

# Columns that quantised formats and kernels work on together, the best first: blocks of K-quants
# have 256 weights of a row, those of other formats of llama.cpp 32, as have int4 kernels of vLLM.
_COLUMNS = (256, 128, 64, 32)
# The fewest widths that leave a choice; models too narrow for any of these are free to have more.
_WIDTHS = 6
_NARROW_WIDTHS = 16
# Least coefficient, of the typical one: nothing is free, whatever noise says.
_FLOOR = 0.1
# Sub-models that have to lack a whole sub-block before it may go: of fewer, noise decides.
_LACKING = 4


def channel_grids(channels: int) -> list[int]:
    """Multiples that a feed-forward of so many channels may keep, the one to prefer first.

    Of 256, 128, 64 and 32 they are those that leave six widths or more. Below 192 channels there is
    none, then it is the largest power of two that leaves sixteen.
    """
    found = [columns for columns in _COLUMNS if channels // columns >= _WIDTHS]
    return found or [1 << (max(1, channels // _NARROW_WIDTHS).bit_length() - 1)]


def fitting(sub_block: SubBlock, widths: Sequence[Width]) -> list[bool]:
    """Which widths of a sub-block have as many columns as formats like that the dense one fits.

    Heads that stay fill a multiple of 256, 128, 64 or 32 columns of the output matrix: of the
    largest that divides the dense number and leaves six widths; if there is none, all widths fit.
    Feed-forwards fit by their grid. None and all always fit.
    """
    extents = [sub_block.extent(sub_block.output_axis, width) for width in widths]
    for columns in _COLUMNS if sub_block.kind == "attention" else ():
        if extents[-1] % columns == 0:
            fits = [extent % columns == 0 for extent in extents]
            if (
                sum(fit and extent > 0 for fit, extent in zip(fits, extents, strict=True))
                >= _WIDTHS
            ):
                return fits
    return [True] * len(widths)


def width_grids(
    sub_blocks: Sequence[SubBlock], grid: int | None, *, whole_groups: bool = False
) -> list[list[Width]]:
    """Widths that each sub-block may have, none first, then rising in parameters to all.

    Attention may keep any number of its key-value groups, and unless they stay whole any number of
    query heads in each, the same in all. Feed-forwards keep a multiple of ``grid`` channels or all
    of them; by default of the first of ``channel_grids``.

    Raises:
        SecateurError: a feed-forward has no multiple of ``grid`` below its own width.
    """
    grids = []
    for sub_block in sub_blocks:
        step = 1
        if sub_block.kind == "ffn":
            step = grid or channel_grids(sub_block.units)[0]
        if step > 1 and step >= sub_block.units:
            raise SecateurError(
                f"Feed-forwards of {sub_block.units} channels have no width that is a multiple of "
                f"{step}; choose a smaller --grid."
            )
        units, queries = sub_block.whole
        fewest = queries if whole_groups else min(1, queries)
        some = product([*range(step, units, step), units], range(fewest, queries + 1))
        widths = sorted((Width(*each) for each in some), key=sub_block.parameters)
        grids.append([Width(0, queries), *widths])
    return grids


def nested_places(grid: Sequence[Width]) -> npt.NDArray[np.int64]:
    """Places of all widths of a grid but none, by query heads and units, rising.

    What is kept at a width is part of what is kept at those behind it in its row and column.
    """
    order = sorted(range(1, len(grid)), key=lambda place: (grid[place].queries, grid[place].units))
    return np.array(order).reshape(len({width.queries for width in grid[1:]}), -1)


def parameter_costs(
    sub_blocks: Sequence[SubBlock], grids: Sequence[Sequence[Width]]
) -> list[list[int]]:
    """Parameters that each width of each sub-block holds."""
    return [
        [sub_block.parameters(width) for width in grid]
        for sub_block, grid in zip(sub_blocks, grids, strict=True)
    ]


@dataclass(frozen=True)
class Penalties:
    """Divergence from the dense model that widths are expected to cause.

    Attributes:
        nats: of each sub-block and each width of its grid, nats per token; they add up. Infinite
            for widths narrower than any that was tried, and for none at all where few sub-models
            had none: of them too little is known.
        explained: share of the variance of the sub-models' divergences that the fit to all others
            foretells; None if they do not differ.
    """

    nats: list[list[float]]
    explained: float | None

    def only(self, fits: Sequence[Sequence[bool]]) -> Penalties:
        """The same with widths that do not fit made infinite."""
        nats = [
            [value if fit else math.inf for value, fit in zip(*row, strict=True)]
            for row in zip(self.nats, fits, strict=True)
        ]
        return Penalties(nats, self.explained)


def fit_penalties(
    grids: Sequence[Sequence[Width]],
    losses: Sequence[Sequence[float]],
    tried: Sequence[Sequence[int]],
    divergences: Sequence[float],
) -> Penalties:
    """Regress divergences on local losses.

    A sub-block has two coefficients, nats per local loss: one of its narrower widths, one for all
    of it being gone, which is more than the sum of its parts. All are expected to be alike, as far
    as sub-models do not say otherwise. A width never costs less than one that it is part of, and a
    sub-block that too few sub-models lacked is not to go.

    Args:
        grids: widths of each sub-block, rising from none.
        losses: local loss of each of them.
        tried: for each sub-model the place in each sub-block's grid.
        divergences: of each sub-model; infinite ones count as the furthest finite one.
    """
    rows = [
        [
            entry
            for loss, place in zip(losses, places, strict=True)
            for entry in ((loss[place], 0.0) if place else (0.0, loss[place]))
        ]
        for places in tried
    ]
    design_NK = torch.tensor(rows, dtype=torch.float64)
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
        if sum(row[place] == 0 for row in tried) < _LACKING:
            priced[0] = math.inf
        nats.append(priced)
    finite_N = divergence_N.isfinite()
    spread = float(divergence_N[finite_N].var(correction=0))
    left_out = float(fit.left_out_N[finite_N].square().mean())
    return Penalties(nats, 1 - left_out / spread if spread else None)


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


def least_cost(costs: Sequence[Sequence[int]], penalties: Sequence[Sequence[float]]) -> int:
    """What the cheapest widths of finite penalty cost together."""
    tables = (zip(*each, strict=True) for each in zip(costs, penalties, strict=True))
    return sum(min(cost for cost, nats in table if nats < math.inf) for table in tables)


def choose_widths(
    costs: Sequence[Sequence[int]],
    penalties: Sequence[Sequence[float]],
    budgets: Sequence[int],
) -> list[Selection]:
    """The widths of least penalty within each budget, in the unit of the costs.

    Costs, in parameters or nanoseconds, and penalties are of each width of each sub-block.
    """
    tables = [WidthOptions(*table) for table in zip(costs, penalties, strict=True)]
    return width_curve(tables, budgets)
