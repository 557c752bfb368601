"""Orders of groups and query heads, what every width costs, and how far a fit is trusted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.shrinking.ordering import UnitOrder, fit_output, order_units
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
        Width(*size): set(attention.columns(order.kept(Width(*size))).tolist())
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
    for width, loss in zip(grid, order.losses(grid), strict=True):
        kept_K = attention.columns(order.kept(width))
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
    losses = order.losses(grid)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


KEPT = torch.arange(4, 24)


def inputs(tokens: int, seed: int) -> Tensor:
    """Inputs of 24 columns that ten numbers and some noise make."""
    mixing = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    noise_NI = 0.3 * torch.randn(tokens, 24, generator=generator)
    return torch.randn(tokens, 10, generator=generator) @ mixing + noise_NI


def gram(x_NI: Tensor) -> Tensor:
    return x_NI.T @ x_NI / len(x_NI)


W_OI = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
HELD_OUT = gram(inputs(2000, 9))


def test_losses_are_those_of_the_outputs() -> None:
    x_NI = inputs(2000, 9)
    fit = fit_output(W_OI, gram(inputs(2000, 2)), HELD_OUT, KEPT)
    dense_NO = x_NI @ W_OI.T
    loss = float((x_NI[:, KEPT] @ fit.v_OK.T - dense_NO).square().sum(1).mean())
    plain = float((x_NI[:, KEPT] @ W_OI[:, KEPT].T - dense_NO).square().sum(1).mean())
    assert (fit.loss, fit.plain_loss) == (
        pytest.approx(loss, rel=1e-4),
        pytest.approx(plain, rel=1e-4),
    )
    assert fit.changed
    assert loss < plain / 2


def test_with_little_text_the_pull_is_stronger_and_the_loss_never_above_plain() -> None:
    for seed in range(20):
        few = gram(inputs(6, seed))
        fit = fit_output(W_OI, few, HELD_OUT, KEPT)
        assert fit.loss <= fit.plain_loss
        assert fit.changed == (fit.loss < fit.plain_loss)
        if not fit.changed:
            assert torch.equal(fit.v_OK, W_OI[:, KEPT])


def test_text_of_another_kind_is_not_fitted_to() -> None:
    other = torch.zeros(24, 24)
    other[0, 0] = other[0, 5] = other[5, 0] = other[5, 5] = 1.0
    unrelated = torch.eye(24)
    fit = fit_output(W_OI, other, unrelated, KEPT)
    assert not fit.changed
    assert fit.loss == fit.plain_loss


def test_nothing_may_be_left() -> None:
    fit = fit_output(W_OI, HELD_OUT, HELD_OUT, torch.arange(0))
    assert fit.v_OK.shape == (8, 0)
    assert fit.loss == pytest.approx(float(((W_OI @ HELD_OUT) * W_OI).sum()), rel=1e-5)
