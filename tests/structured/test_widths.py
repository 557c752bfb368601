"""Grids of widths, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.structured.source import open_source
from secateur.structured.units import SubBlock, find_sub_blocks
from secateur.structured.widths import choose_widths, parameter_costs, width_grids


@pytest.fixture(scope="module")
def sub_blocks(checkpoints: Callable[..., Path]) -> list[SubBlock]:
    return find_sub_blocks(open_source(checkpoints("llama")).blocks)


def test_grids_rise_from_none_to_all(sub_blocks: list[SubBlock]) -> None:
    attention, feed_forward, *_ = width_grids(sub_blocks, None)
    assert attention == [0, 1, 2]
    assert feed_forward == list(range(0, 65, 4))
    assert width_grids(sub_blocks, 24)[1] == [0, 24, 48, 64]
    assert width_grids(sub_blocks, 1)[1] == list(range(65))


def test_a_grid_that_no_width_fits_is_refused(sub_blocks: list[SubBlock]) -> None:
    with pytest.raises(SecateurError, match="multiple of 64"):
        width_grids(sub_blocks, 64)


def test_the_choice_is_the_best_within_each_budget(sub_blocks: list[SubBlock]) -> None:
    chosen = sub_blocks[:2]
    grids = [[0, 1, 2], [0, 32, 64]]
    penalties = [[3.0, 1.0, 0.0], [5.0, 1.5, 0.0]]
    options = [
        (
            sum(w * each.unit_parameters for w, each in zip(widths, chosen, strict=True)),
            sum(p[g.index(w)] for w, g, p in zip(widths, grids, penalties, strict=True)),
        )
        for widths in product(*grids)
    ]
    budgets = [0, 3000, 6000, 10**6]
    costs = parameter_costs(chosen, grids)
    for budget, found in zip(budgets, choose_widths(costs, penalties, budgets), strict=True):
        assert found.loss == min(loss for cost, loss in options if cost <= budget)
        assert found.cost <= budget
