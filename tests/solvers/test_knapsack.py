"""Widths under a budget against all combinations."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runs.errors import SecateurError
from secateur.solvers.knapsack import RESOLUTION, Selection, WidthOptions, width_curve

losses = st.one_of(st.floats(-5, 100), st.just(math.inf))


@st.composite
def tables(draw: st.DrawFn, multiple: int = 1) -> list[WidthOptions]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        options = draw(st.lists(st.tuples(st.integers(0, 60), losses), min_size=1, max_size=5))
        options.append((draw(st.integers(0, 60)), draw(st.floats(0, 100))))
        costs, values = zip(*options, strict=True)
        found.append(WidthOptions([cost * multiple for cost in costs], values))
    return found


def all_selections(tables: list[WidthOptions]) -> list[Selection]:
    return [
        Selection(
            choices,
            sum(table.costs[k] for table, k in zip(tables, choices, strict=True)),
            math.fsum(table.losses[k] for table, k in zip(tables, choices, strict=True)),
        )
        for choices in product(*(range(len(table.costs)) for table in tables))
    ]


def select_widths(
    tables: list[WidthOptions], budget: int, resolution: int = RESOLUTION
) -> Selection:
    return width_curve(tables, [budget], resolution)[0]


def lowest_loss(tables: list[WidthOptions], budget: int) -> float:
    return min((s.loss for s in all_selections(tables) if s.cost <= budget), default=math.inf)


@settings(max_examples=50)
@given(tables=st.one_of(tables(), tables(multiple=1728)), share=st.floats(0, 1.2))
def test_no_selection_within_the_budget_is_better(tables: list[WidthOptions], share: float) -> None:
    budget = int(share * sum(max(table.costs) for table in tables))
    best = lowest_loss(tables, budget)
    if best == math.inf:
        with pytest.raises(SecateurError, match="cheapest widths"):
            select_widths(tables, budget)
        return
    found = select_widths(tables, budget)
    assert found in all_selections(tables)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best, abs=1e-9)


@settings(max_examples=50)
@given(tables=tables(multiple=1000), resolution=st.integers(1, 50))
def test_a_coarse_resolution_never_exceeds_the_budget(
    tables: list[WidthOptions], resolution: int
) -> None:
    allowed = [s for s in all_selections(tables) if s.loss < math.inf]
    least, most = min(s.cost for s in allowed), max(s.cost for s in allowed)
    budget = (least + most) // 2
    found = select_widths(tables, budget, resolution)
    assert found.cost <= budget
    # At most one unit is lost to rounding for each table, and a part of one for the budget.
    unit = 1000 * -(-(budget - least) // (1000 * resolution))
    tighter = budget - unit * (len(tables) + 1)
    assert found.loss <= lowest_loss(tables, tighter) + 1e-9
    ample = select_widths(tables, (most + 1000) * (len(tables) + 2), resolution)
    assert ample.loss == pytest.approx(lowest_loss(tables, most), abs=1e-9)


@settings(max_examples=50)
@given(tables=tables())
def test_a_curve_is_the_selection_for_each_budget(tables: list[WidthOptions]) -> None:
    allowed = [s for s in all_selections(tables) if s.loss < math.inf]
    least, most = min(s.cost for s in allowed), max(s.cost for s in allowed)
    budgets = sorted({least, (least + most) // 3, most // 2, most, 2 * most} - set(range(least)))
    curve = width_curve(tables, budgets)
    assert curve == [select_widths(tables, budget) for budget in budgets]
    found = [selection.loss for selection in curve]
    assert found == sorted(found, reverse=True)


def test_the_cheaper_of_equal_widths_is_taken() -> None:
    tables = [WidthOptions([5, 3, 4], [1.0, 1.0, 1.0])]
    assert select_widths(tables, 10) == Selection((1,), 3, 1.0)


def test_many_sub_blocks_of_fine_widths() -> None:
    widths = range(0, 1537, 64)
    tables = [
        WidthOptions([width * 1728 for width in widths], [scale / (width + 64) for width in widths])
        for scale in range(1, 61)
    ]
    budget = sum(table.costs[-1] for table in tables) // 2
    found = select_widths(tables, budget)
    assert budget - 64 * 1728 < found.cost <= budget
    # Losses are convex in the width, so no exchange of one step pays.
    saved, paid = [], []
    for table, k in zip(tables, found.choices, strict=True):
        if k + 1 < len(widths):
            saved.append(table.losses[k] - table.losses[k + 1])
        if k:
            paid.append(table.losses[k - 1] - table.losses[k])
    assert max(saved) <= min(paid) + 1e-12


def test_no_budgets_give_no_selections() -> None:
    assert width_curve([WidthOptions([1], [0.0])], []) == []


def test_what_cannot_be_solved_is_refused() -> None:
    good = WidthOptions([2, 4], [1.0, 0.0])
    with pytest.raises(SecateurError, match="budget of 3 is less than 4"):
        select_widths([good, good], 3)
    with pytest.raises(SecateurError, match="sub-block 1 is NaN"):
        select_widths([good, WidthOptions([1], [math.nan])], 9)
    with pytest.raises(SecateurError, match="sub-block 0 has no width"):
        select_widths([WidthOptions([1], [math.inf])], 9)
