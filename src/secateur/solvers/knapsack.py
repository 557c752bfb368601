"""Choose one width for every sub-block so that the losses sum to least within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.runs.errors import SecateurError

# Largest number of steps that the budget is divided into.
RESOLUTION = 1 << 16


@dataclass(frozen=True)
class WidthOptions:
    """The widths that one sub-block may have.

    Attributes:
        costs: Of each width, integers in any one unit: parameters, nanoseconds.
        losses: Of each width; infinite for one that is not allowed.
    """

    costs: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True)
class Selection:
    """One width for every sub-block.

    Attributes:
        choices: Index into the options of each sub-block.
        cost: Sum of their costs.
        loss: Sum of their losses.
    """

    choices: tuple[int, ...]
    cost: int
    loss: float


def width_curve(
    tables: Sequence[WidthOptions], budgets: Sequence[int], resolution: int = RESOLUTION
) -> list[Selection]:
    """The widths of least total loss within each of several budgets.

    Multiple-choice knapsack by dynamic programming over costs, one table for all budgets. Costs
    are counted above those of the cheapest widths and in units of their greatest common divisor.
    The result is exact if the largest budget leaves at most ``resolution`` such units. Otherwise
    units are multiples of that divisor, and costs are rounded up: no budget is ever exceeded, and
    less than one unit is lost for each sub-block.

    Of selections with the same loss the one with cheaper options in later tables is taken. Time is
    options · steps, memory tables · steps.

    Args:
        tables: Options of each sub-block.
        budgets: Most that the widths may cost together.
        resolution: Largest number of steps.

    Raises:
        SecateurError: A budget is below what the cheapest widths cost, a loss is NaN, or a table
            allows nothing.
    """
    allowed = [_Allowed(position, table) for position, table in enumerate(tables)]
    least = sum(options.cheapest for options in allowed)
    for budget in budgets:
        if budget < least:
            raise SecateurError(
                f"a budget of {budget} is less than {least}, what the cheapest widths cost "
                "together; raise it or allow smaller widths"
            )
    if not budgets:
        return []
    dearest = sum(options.dearest for options in allowed)
    spare = min(max(budgets), dearest) - least
    unit = math.gcd(*(int(extra) for options in allowed for extra in options.extra_K)) or 1
    unit *= max(1, -(-spare // (unit * resolution)))
    most_steps = sum(int(options.steps(unit)[-1]) for options in allowed)
    steps = [min((budget - least) // unit, most_steps) for budget in budgets]
    picks = _fill(allowed, max(steps), unit)
    return [_trace_back(tables, allowed, picks, count, unit) for count in steps]


class _Allowed:
    """The options of one table that are allowed, cheapest first."""

    def __init__(self, position: int, table: WidthOptions) -> None:
        cost_K = np.asarray(table.costs, np.int64)
        loss_K = np.asarray(table.losses, np.float64)
        if np.isnan(loss_K).any():
            raise SecateurError(f"a loss of sub-block {position} is NaN; measure it again")
        index_K = np.flatnonzero(loss_K < np.inf)
        if not len(index_K):
            raise SecateurError(f"sub-block {position} has no width that is allowed; allow one")
        self.index_K = index_K[np.argsort(cost_K[index_K], kind="stable")]
        self.loss_K = loss_K[self.index_K]
        self.cheapest = int(cost_K[self.index_K[0]])
        self.dearest = int(cost_K[self.index_K[-1]])
        self.extra_K = cost_K[self.index_K] - self.cheapest

    def steps(self, unit: int) -> npt.NDArray[np.int64]:
        return -(-self.extra_K // unit)


def _fill(allowed: Sequence[_Allowed], capacity: int, unit: int) -> list[npt.NDArray[np.int32]]:
    """For each table and each number of steps up to the capacity, which option is best."""
    best_C = np.zeros(capacity + 1)
    picks = []
    for options in allowed:
        lowest_C = np.full(capacity + 1, np.inf)
        pick_C = np.zeros(capacity + 1, np.int32)
        for option, (steps, loss) in enumerate(
            zip(options.steps(unit), options.loss_K, strict=True)
        ):
            if steps > capacity:
                break
            total_C = best_C[: capacity + 1 - steps] + loss
            better_C = total_C < lowest_C[steps:]
            np.copyto(lowest_C[steps:], total_C, where=better_C)
            np.copyto(pick_C[steps:], option, where=better_C)
        best_C = lowest_C
        picks.append(pick_C)
    return picks


def _trace_back(
    tables: Sequence[WidthOptions],
    allowed: Sequence[_Allowed],
    picks: Sequence[npt.NDArray[np.int32]],
    steps: int,
    unit: int,
) -> Selection:
    choices = []
    for options, pick_C in zip(reversed(allowed), reversed(picks), strict=True):
        option = int(pick_C[steps])
        steps -= int(options.steps(unit)[option])
        choices.append(int(options.index_K[option]))
    choices.reverse()
    return Selection(
        tuple(choices),
        sum(int(table.costs[k]) for table, k in zip(tables, choices, strict=True)),
        math.fsum(table.losses[k] for table, k in zip(tables, choices, strict=True)),
    )
