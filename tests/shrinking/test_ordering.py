"""Orders of groups and of query heads in them, and what every width costs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.shrinking.cut import kept_columns
from secateur.shrinking.ordering import UnitOrder, order_units
from secateur.shrinking.source import open_source
from secateur.shrinking.units import SubBlock, Width, find_sub_blocks
from secateur.shrinking.widths import width_grids
from secateur.solvers.elimination import nested_losses
from solvers.problems import make_problem, quadratic_error
from tiny import make_checkpoint


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> SubBlock:
    """Three groups of three query heads, each of four columns."""
    folder = tmp_path_factory.mktemp("grouped")
    make_checkpoint(
        "qwen3", folder, num_attention_heads=9, num_key_value_heads=3, head_dim=4, hidden_size=36
    )
    return find_sub_blocks(open_source(folder).blocks)[0]


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    return make_problem(5, 36, 200, seed)


def ordered(attention: SubBlock) -> UnitOrder:
    return order_units(attention, *problem(), queries=True)


def test_widths_are_nested_in_groups_and_in_queries(attention: SubBlock) -> None:
    order = ordered(attention)
    columns = {
        Width(*size): set(kept_columns(attention, order.kept(Width(*size))).tolist())
        for size in product(range(1, 4), range(1, 4))
    }
    for narrow, wide in product(columns, columns):
        assert len(columns[narrow]) == 4 * narrow.units * narrow.queries
        if narrow.units <= wide.units and narrow.queries <= wide.queries:
            assert columns[narrow] <= columns[wide]
    assert order.kept(Width(0, 3)).shape == (0,)
    assert order.kept(attention.whole).tolist() == [0, 1, 2]


def test_every_kept_group_has_as_many_of_its_own_queries(attention: SubBlock) -> None:
    kept = ordered(attention).kept(Width(2, 2))
    assert kept.shape == (2, 2)
    groups = kept // 3
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert torch.equal(kept, kept.sort(1).values)
    assert attention.width_of(kept) == Width(2, 2)


def test_losses_are_least_squares_over_what_is_kept(attention: SubBlock) -> None:
    w_OI, gram_II = problem()
    order = ordered(attention)
    h_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(36).to(gram_II)
    grid = width_grids([attention], None)[0]
    for width, loss in zip(grid, order.losses(w_OI, gram_II, grid), strict=True):
        kept_K = kept_columns(attention, order.kept(width))
        fitted_OI = torch.zeros_like(w_OI)
        fitted_OI[:, kept_K] = torch.linalg.solve(h_II[kept_K][:, kept_K], h_II[kept_K] @ w_OI.T).T
        expected = float(quadratic_error(w_OI - fitted_OI, h_II).sum())
        assert loss == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_the_first_round_takes_the_cheapest_query_of_the_first_group_to_lose_one(
    attention: SubBlock,
) -> None:
    w_OI, gram_II = problem()
    order = ordered(attention)
    assert order.heads is not None
    rounds = order.heads.order_U.view(3, 3)
    assert all((each // 3).sort().values.tolist() == [0, 1, 2] for each in rounds)
    alone = [
        float(nested_losses(w_OI, gram_II, torch.arange(9).roll(-head), 4)[0]) for head in range(9)
    ]
    assert int(rounds[0, 0]) == min(range(9), key=alone.__getitem__)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_without_queries_groups_and_channels_stay_whole(
    kind: str, checkpoints: Callable[..., Path]
) -> None:
    sub_blocks = find_sub_blocks(open_source(checkpoints("llama")).blocks)
    sub_block = next(each for each in sub_blocks if each.kind == kind)
    w_OI, gram_II = make_problem(5, sub_block.columns_UP.numel())
    order = order_units(sub_block, w_OI, gram_II)
    (grid,) = width_grids([sub_block], None, whole_groups=True)
    assert order.heads is None
    assert all(order.kept(width).shape == (width.units,) for width in grid)
    losses = order.losses(w_OI, gram_II, grid)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
