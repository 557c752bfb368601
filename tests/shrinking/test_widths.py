"""Grids of widths, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from secateur.runs.errors import SecateurError
from secateur.shrinking.source import open_source
from secateur.shrinking.units import SubBlock, Width, find_sub_blocks
from secateur.shrinking.widths import (
    choose_widths,
    nested_places,
    parameter_costs,
    width_grids,
)


@pytest.fixture(scope="module")
def sub_blocks(checkpoints: Callable[..., Path]) -> list[SubBlock]:
    return find_sub_blocks(open_source(checkpoints("llama")).blocks)


def test_grids_rise_from_none_to_all(sub_blocks: list[SubBlock]) -> None:
    attention, feed_forward, *_ = width_grids(sub_blocks, None)
    assert attention == [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert feed_forward == [(width, 0) for width in range(0, 65, 4)]
    assert width_grids(sub_blocks, None, whole_groups=True)[0] == [(0, 2), (1, 2), (2, 2)]
    assert width_grids(sub_blocks, 24)[1] == [(0, 0), (24, 0), (48, 0), (64, 0)]
    assert width_grids(sub_blocks, 1)[1] == [(width, 0) for width in range(65)]
    costs = parameter_costs(sub_blocks, width_grids(sub_blocks, None))
    assert all(cost == sorted(cost) and cost[0] == 0 for cost in costs)


def test_a_grid_that_no_width_fits_is_refused(sub_blocks: list[SubBlock]) -> None:
    with pytest.raises(SecateurError, match="multiple of 64"):
        width_grids(sub_blocks, 64)


def test_the_choice_is_the_best_within_each_budget(sub_blocks: list[SubBlock]) -> None:
    chosen = sub_blocks[:2]
    attention = [Width(0, 2), Width(1, 1), Width(1, 2), Width(2, 1), Width(2, 2)]
    grids = [attention, [Width(0, 0), Width(32, 0), Width(64, 0)]]
    penalties = [[3.0, 1.4, 1.0, 0.5, 0.0], [5.0, 1.5, 0.0]]
    options = [
        (
            sum(each.parameters(w) for w, each in zip(widths, chosen, strict=True)),
            sum(p[g.index(w)] for w, g, p in zip(widths, grids, penalties, strict=True)),
        )
        for widths in product(*grids)
    ]
    budgets = [0, 3000, 6000, 10**6]
    costs = parameter_costs(chosen, grids)
    for budget, found in zip(budgets, choose_widths(costs, penalties, budgets), strict=True):
        assert found.loss == min(loss for cost, loss in options if cost <= budget)
        assert found.cost <= budget


def test_widths_that_are_part_of_each_other_stand_in_rows_and_columns(
    sub_blocks: list[SubBlock],
) -> None:
    attention, feed_forward = width_grids(sub_blocks, 16)[:2]
    table = [[attention[place] for place in row] for row in nested_places(attention)]
    assert table == [[(1, 1), (2, 1)], [(1, 2), (2, 2)]]
    assert nested_places(feed_forward).tolist() == [[1, 2, 3, 4]]
