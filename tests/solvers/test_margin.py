"""Costs by row and column, slopes at the margin and following them, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.solvers import margin
from secateur.solvers.margin import cheapest, follow_margin, margin_threshold
from solvers.row_costs import all_costs, random_costs, two_rows


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margin, "row_chunks", two_rows)


def test_the_cheapest_weights_of_all_linears_go_and_exactly_as_many_as_asked() -> None:
    costs = [random_costs(0, torch.float32), random_costs(1, torch.float32, rows=3)]
    flat = torch.cat([all_costs(each).flatten() for each in costs])
    for zeros in (0, 1, 77, len(flat)):
        masks = cheapest(costs, zeros)
        expected = torch.ones(len(flat), dtype=torch.bool)
        expected[flat.argsort(stable=True)[:zeros]] = False
        assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)


def test_the_threshold_lies_about_where_the_asked_share_is_cheaper() -> None:
    costs = [random_costs(seed, torch.float32, rows=200) for seed in range(3)]
    threshold = margin_threshold(costs, 0.3)
    cheaper = torch.cat([all_costs(each).flatten() for each in costs]) <= threshold
    assert float(cheaper.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_row_whose_weights_are_missed_becomes_dearer_and_another_cheaper() -> None:
    root_O = torch.full((3,), 2.0)
    follow_margin(root_O, torch.tensor([2.0, -2.0, 100.0]), threshold=2.0, pull=0.5)
    # Squares: costs are roots of what a removal is expected to do.
    expected = [4 * math.exp(0.25), 4 * math.exp(-0.25), 4 * math.exp(0.5)]
    torch.testing.assert_close(root_O.square(), torch.tensor(expected))
