"""Widths that sub-blocks may have, and the ones that a budget leaves them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from secateur.runs.errors import SecateurError
from secateur.shrinking.units import SubBlock, Width
from secateur.solvers.knapsack import Selection, WidthOptions, width_curve

# What kernels of accelerators and quantisers like, and the fewest steps that leave a choice.
_CHANNELS = 64
_STEPS = 16


def width_grids(
    sub_blocks: Sequence[SubBlock], grid: int | None, *, whole_groups: bool = False
) -> list[list[Width]]:
    """Widths that each sub-block may have, none first, then rising in parameters to all.

    Attention may keep any number of its key-value groups, and unless they stay whole any number of
    query heads in each, the same in all. Feed-forwards keep a multiple of ``grid`` channels or all
    of them; by default the largest power of two up to 64 that gives them sixteen widths or more.

    Raises:
        SecateurError: a feed-forward has no multiple of ``grid`` below its own width.
    """
    grids = []
    for sub_block in sub_blocks:
        step = 1
        if sub_block.kind == "ffn":
            step = grid or _default_step(sub_block.units)
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


def choose_widths(
    costs: Sequence[Sequence[int]],
    penalties: Sequence[Sequence[float]],
    budgets: Sequence[int],
) -> list[Selection]:
    """The widths of least penalty that cost at most so much together, for each budget.

    Args:
        costs: of each width of each sub-block, in parameters or nanoseconds.
        penalties: of each of these widths.
        budgets: in the unit of the costs.
    """
    tables = [WidthOptions(*table) for table in zip(costs, penalties, strict=True)]
    return width_curve(tables, budgets)


def _default_step(channels: int) -> int:
    most = max(1, channels // _STEPS)
    return int(min(_CHANNELS, 2 ** math.floor(math.log2(most))))
