"""Widths by their time on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from secateur.cli import app
from secateur.runs.errors import SecateurError
from secateur.shrinking import latency, nested
from secateur.shrinking.latency import Timing, time_widths
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink
from secateur.shrinking.source import open_source
from secateur.shrinking.units import Width, find_sub_blocks
from secateur.shrinking.widths import nested_places, width_grids

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_rise_from_none_in_blocks_of_one_shape_alike(
    family: str, dtype: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    source = open_source(checkpoints(family))
    sub_blocks = find_sub_blocks(source.blocks)
    grids = width_grids(sub_blocks, None)
    store = source.store(CPU)
    timing = time_widths(store, sub_blocks, grids, torch.arange(32), CPU, dtype)
    for each, grid, cost, first in zip(
        sub_blocks, grids, timing.costs, timing.costs[:2] * 3, strict=True
    ):
        assert len(cost) == len(grid), each.label
        assert cost[0] == 0
        assert cost[-1] == max(cost)
        for row in nested_places(grid):
            assert cost[row[0]] <= cost[row[-1]]
        assert cost == first
    assert timing.total > 0
    assert {parameter.dtype for parameter in store.load(0).parameters()} == {torch.float32}


def test_times_between_the_knots_lie_on_straight_lines_in_groups_and_queries() -> None:
    grid = [Width(0, 8), *(Width(u, q) for u in range(1, 13) for q in range(1, 9))]
    # Eight nanoseconds for a group and one for a query head, beside thirty for the rest.
    exact = {width: 30e-9 + 1e-9 * width.units * (8 + width.queries) for width in grid}
    exact[grid[0]] = 30e-9
    knots = latency._knots(grid)
    assert knots[0] == grid[0]
    assert len(knots) == 1 + 5 * 3
    assert grid[-1] in knots
    costs = latency._costs(grid, {width: exact[width] for width in knots})
    assert costs == [round(1e9 * (exact[width] - 30e-9)) for width in grid]


def test_no_width_counts_as_slower_than_one_that_contains_it() -> None:
    grid = [Width(0, 2), Width(1, 1), Width(1, 2), Width(2, 1), Width(2, 2)]
    seconds = dict(zip(grid, [5e-9, 9e-9, 6e-9, 7e-9, 8e-9], strict=True))
    assert latency._costs(grid, seconds) == [0, 4, 4, 4, 4]


def test_budget_is_a_share_of_all_that_takes_time() -> None:
    timing = Timing([[0, 30, 60], [0, 20]], total=100)
    assert timing.budget(0.5) == 80 - 50
    with pytest.raises(SecateurError, match=r"80\.0% of the blocks' time"):
        timing.budget(0.8)


def test_widths_that_save_no_time_are_not_taken(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A machine on which attention is free and feed-forwards are in steps of 32 channels.
    def steps(
        _store: object, sub_blocks: list[object], grids: list[list[Width]], *_: object
    ) -> Timing:
        costs = [[-(-w // 32) * 1000 if q == 0 else 0 for w, q in grid] for grid in grids]
        return Timing(costs, total=3 * 2000)

    monkeypatch.setattr(nested, "time_widths", steps)
    options = ShrinkOptions.from_mapping(
        {
            "sparsity": 0.3,
            "budget": "latency",
            "sub_models": 12,
            "dtype": "float32",
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        }
    )
    report = shrink(checkpoints("llama"), tmp_path / "out", options).report
    kept = [each.kept for each in report.sub_blocks]
    assert kept[::2] == [2, 2, 2]
    assert [each.queries for each in report.sub_blocks[::2]] == [2, 2, 2]
    assert set(kept[1::2]) <= {0, 32, 64}
    assert report.latency is not None
    assert report.latency.before == pytest.approx(6e-6)
    assert report.latency.expected <= 0.7 * report.latency.before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize("flags", [["--uniform"], ["--padded"], ["--curve"]])
def test_where_no_widths_are_chosen_time_is_refused(
    flags: list[str], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app,
        ["shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--budget", "latency",
         *flags],
    )  # fmt: skip
    assert isinstance(result.exception, SecateurError)
    assert "budget" in str(result.exception).lower()
    assert not (tmp_path / "out").exists()
