"""Grids of widths, the choice among them, and penalties from the divergences of sub-models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import draw_widths
from secateur.shrinking.units import SubBlock, UnitAxis, Width, find_sub_blocks
from secateur.shrinking.widths import (
    channel_grids,
    choose_widths,
    fit_penalties,
    fitting,
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


@pytest.mark.parametrize(
    ("channels", "grids"),
    [
        (14336, [256, 128, 64, 32]), (1536, [256, 128, 64, 32]), (1535, [128, 64, 32]),
        (1000, [128, 64, 32]), (400, [64, 32]), (192, [32]), (191, [8]), (128, [8]), (7, [1]),
    ],
)  # fmt: skip
def test_feed_forwards_keep_the_largest_multiples_that_leave_a_choice(
    channels: int, grids: list[int]
) -> None:
    assert channel_grids(channels) == grids


@pytest.mark.parametrize(
    ("groups", "queries", "head_dim", "columns"),
    # SmolLM2 fits 64 as it is, Llama 3 8B and TinyLlama 256; of GPT-2 three widths fit 256.
    [(3, 3, 64, 64), (8, 4, 128, 256), (4, 8, 64, 256), (12, 1, 64, 128), (2, 2, 8, 1)],
)
def test_heads_that_stay_fit_what_the_dense_ones_fit(
    groups: int, queries: int, head_dim: int, columns: int
) -> None:
    positions_UP = torch.arange(groups * queries * head_dim).view(groups, -1)
    axis = UnitAxis("o_proj.weight", 1, 8, positions_UP, head_dim)
    attention = SubBlock(0, "attention", (axis,), "o_proj")
    (grid,) = width_grids([attention], None)
    fit = fitting(attention, grid)
    assert fit == [units * own * head_dim % columns == 0 for units, own in grid]
    assert fit[0]
    assert fit[-1]


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


GRIDS = [
    [Width(count, 0) for count in counts] for counts in (range(4), range(0, 33, 4), range(0, 33, 4))
]
LOSSES = [[(grid[-1].units - width.units) ** 2 / 100 for width in grid] for grid in GRIDS]
SCALES = [1.0, 0.2, 5.0]


def drawn(count: int) -> list[list[int]]:
    costs = [[width.units for width in grid] for grid in GRIDS]
    return draw_widths(costs, [0.5] * count, torch.Generator().manual_seed(0))


def truth(row: list[int]) -> float:
    return sum(scale * loss[place] for scale, loss, place in zip(SCALES, LOSSES, row, strict=True))


def test_scales_of_sub_blocks_are_recovered() -> None:
    rows = drawn(64)
    found = fit_penalties(GRIDS, LOSSES, rows, [truth(row) for row in rows])
    assert found.explained == pytest.approx(1, abs=1e-4)
    for nats, loss, scale in zip(found.nats, LOSSES, SCALES, strict=True):
        assert nats == pytest.approx([scale * each for each in loss], rel=0.01)


def test_broken_sub_models_hardly_count() -> None:
    rows = drawn(64)
    measured = [truth(row) for row in rows]
    measured[5] = measured[17] = float("inf")
    found = fit_penalties(GRIDS, LOSSES, rows, measured)
    for nats, loss, scale in zip(found.nats, LOSSES, SCALES, strict=True):
        assert nats[1] == pytest.approx(scale * loss[1], rel=0.3)


def test_noise_alone_leaves_the_local_losses() -> None:
    rows = drawn(64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0)).tolist()
    mean = sum(map(truth, rows)) / 64
    found = fit_penalties(GRIDS, LOSSES, rows, [mean + 3 * each for each in noise])
    for nats, loss in zip(found.nats, LOSSES, strict=True):
        assert nats == sorted(nats, reverse=True)
        assert nats[-1] == 0
        assert (nats[0] > 0) == (loss[0] > 0)


def test_nothing_is_free_and_penalties_never_fall_with_the_width() -> None:
    rows = drawn(64)
    helpful = [truth(row) - 20 * LOSSES[1][row[1]] for row in rows]
    found = fit_penalties(GRIDS, LOSSES, rows, helpful)
    assert all(value > 0 for value in found.nats[1][:-1])
    for nats in found.nats:
        assert nats == sorted(nats, reverse=True)


def test_widths_narrower_than_any_tried_are_left_out_but_not_the_missing_sub_block() -> None:
    rows = [row for row in drawn(256) if row[1] == 0 or row[1] >= 4]
    found = fit_penalties(GRIDS, LOSSES, rows, [truth(row) for row in rows])
    finite = [value < float("inf") for value in found.nats[1]]
    assert finite == [place == 0 or place >= 4 for place in range(9)]


def test_a_sub_block_goes_only_if_enough_sub_models_lacked_it() -> None:
    rows = [[3, 8, 8], *([[place, 8, 8] for place in (1, 2, 3)] * 8)]
    for lacking in (3, 4):
        tried = rows + [[0, 8, 8]] * lacking
        found = fit_penalties(GRIDS, LOSSES, tried, [truth(row) for row in tried])
        assert (found.nats[0][0] == float("inf")) == (lacking == 3)


def test_a_width_costs_no_less_than_what_it_is_part_of_but_more_than_others_of_its_size() -> None:
    grid = [Width(0, 2), Width(1, 1), Width(1, 2), Width(2, 1), Width(2, 2)]
    rows = [[place] for place in range(5)] * 8
    found = fit_penalties([grid], [[9.0, 3.0, 4.0, 1.0, 0.0]], rows, [float(p) for (p,) in rows])
    (nats,) = found.nats
    assert nats[0] >= nats[1] == nats[2] > nats[3] > nats[4] == 0
    (only,) = found.only([[True, False, True, True, True]]).nats
    assert only == [nats[0], float("inf"), *nats[2:]]
