"""Bonsai: rounds on a tiny model, goals met to less than a unit, priors, and masks in pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.evaluation import scores
from secateur.models.structure import BlockList
from secateur.models.text_path import find_blocks
from secateur.shrinking.bonsai import (
    Anywhere,
    Exactly,
    Goal,
    InputMoments,
    Parent,
    Prior,
    Round,
    RoundOptions,
    Trial,
    draw_masks,
    fill,
    lowest,
    observed_moments,
    output_weight,
    prune_round,
    remove,
    sample_without_replacement,
    sampling_weights,
    score_units,
)
from secateur.shrinking.options import round_shares
from secateur.shrinking.sub_models import narrowed
from secateur.shrinking.units import SubBlock, all_units, find_sub_blocks, kept_parameters

WINDOWS = torch.randint(4, 260, (4, 24), generator=torch.Generator().manual_seed(0))
OPTIONS = RoundOptions(prior="wanda", masks=12, seed=0)


@pytest.fixture(scope="module")
def blocks(checkpoints: Callable[..., Path]) -> BlockList:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64)
    return find_blocks(model.eval())


def goal_of(sub_blocks: list[SubBlock], share: float) -> Anywhere:
    total = kept_parameters(sub_blocks, all_units(sub_blocks))
    return Anywhere(
        round(share * total),
        [each.units for each in sub_blocks],
        [each.unit_parameters for each in sub_blocks],
    )


def one_round(
    blocks: BlockList,
    *,
    number: int = 0,
    options: RoundOptions = OPTIONS,
    kept: list[Tensor] | None = None,
) -> Round:
    sub_blocks = find_sub_blocks(blocks)
    return prune_round(
        Parent(blocks, sub_blocks, torch.float32),
        kept or all_units(sub_blocks),
        goal_of(sub_blocks, 0.2),
        1.0,
        WINDOWS,
        number,
        options,
    )


def test_a_round_removes_its_budget(blocks: BlockList) -> None:
    sub_blocks = find_sub_blocks(blocks)
    found = one_round(blocks)
    kept = remove(all_units(sub_blocks), found.removed)
    budget = goal_of(sub_blocks, 0.2).budget
    gone = kept_parameters(sub_blocks, found.removed)
    assert budget - min(each.unit_parameters for each in sub_blocks) < gone <= budget
    assert [len(units) + len(left) for units, left in zip(found.removed, kept, strict=True)] == [
        each.units for each in sub_blocks
    ]
    assert found.tokens == 13 * WINDOWS.numel()


def test_a_seed_decides_everything_and_rounds_differ(blocks: BlockList) -> None:
    first, again, later = one_round(blocks), one_round(blocks), one_round(blocks, number=1)
    seeded = one_round(blocks, options=replace(OPTIONS, seed=1))
    assert first.utilities == again.utilities
    assert all(map(torch.equal, first.removed, again.removed))
    assert first.utilities != later.utilities
    assert first.utilities != seeded.utilities


def test_the_order_of_units_does_not_matter(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64).eval()
    first = one_round(find_blocks(model))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mlp = find_blocks(model)[1].get_submodule("mlp")
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight_OI = mlp.get_parameter(f"{name}.weight").data
        weight_OI.copy_(weight_OI.index_select(axis, order))
    again = one_round(find_blocks(model))
    assert again.utilities == pytest.approx(first.utilities, rel=1e-6)
    for place, (before, after) in enumerate(zip(first.removed, again.removed, strict=True)):
        found = order[after] if place == 3 else after
        assert set(found.tolist()) == set(before.tolist())


def test_batches_do_not_matter(blocks: BlockList, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = one_round(blocks)
    monkeypatch.setattr(scores, "_BATCH_TOKENS", 1)
    single = one_round(blocks)
    assert single.utilities == pytest.approx(whole.utilities, rel=1e-6)
    assert all(map(torch.equal, single.removed, whole.removed))


def test_rounds_go_on_when_sub_blocks_are_gone_or_down_to_one_unit(blocks: BlockList) -> None:
    sub_blocks = find_sub_blocks(blocks)
    kept = [torch.arange(each.units)[: number % 3] for number, each in enumerate(sub_blocks)]
    kept[1] = torch.arange(64)
    dense = [each.units for each in sub_blocks]
    gone = kept_parameters(sub_blocks, all_units(sub_blocks)) - kept_parameters(sub_blocks, kept)
    goal = Anywhere(gone + 900, dense, [each.unit_parameters for each in sub_blocks])
    found = prune_round(
        Parent(blocks, sub_blocks, torch.float32), kept, goal, 1.0, WINDOWS, 0, OPTIONS
    )
    for left, units in zip(kept, found.removed, strict=True):
        assert set(units.tolist()) <= set(left.tolist())
    left = kept_parameters(sub_blocks, kept) - kept_parameters(sub_blocks, found.removed)
    assert left < kept_parameters(sub_blocks, kept)


def test_sub_models_that_fall_apart_do_not_stop_a_round(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64).eval()
    # Two channels cancel each other exactly; one without the other is beyond fp32.
    broken = find_blocks(model)
    mlp = broken[2].get_submodule("mlp")
    for name in ("gate_proj", "up_proj"):
        weight_OI = mlp.get_parameter(f"{name}.weight").data
        weight_OI[1] = weight_OI[0]
    down_OI = mlp.get_parameter("down_proj.weight").data
    down_OI[:, 0], down_OI[:, 1] = 2.0**600, -(2.0**600)
    found = one_round(broken, options=replace(OPTIONS, prior="random", seed=1))
    assert not torch.tensor(found.utilities).isfinite().all()
    assert all(value is None or value == value for value in found.coefficients)


SEEDS = st.integers(0, 1000)


def rounds_of(goal: Goal, dense: list[int], shares: list[float], seed: int) -> list[int]:
    """Rounds with random scores; the units that are left."""
    generator = torch.Generator().manual_seed(seed)
    units = list(dense)
    pending = list(shares)
    while pending or not goal.reached(1.0, units):
        share = pending.pop(0) if pending else 1.0
        if goal.reached(share, units):
            continue
        trials = goal.trials(share, units)
        for count, trial in zip(units, trials, strict=True):
            assert 0 <= trial.drawn <= trial.candidates <= count
        scores: list[Tensor] = [
            torch.randn(trial.candidates, generator=generator) for trial in trials
        ]
        gone = goal.choose(share, units, scores)
        assert any(map(len, gone))
        for score_C, positions in zip(scores, gone, strict=True):
            assert len(positions.unique()) == len(positions)
            assert all(0 <= position < len(score_C) for position in positions.tolist())
        units = [count - len(each) for count, each in zip(units, gone, strict=True)]
    return units


@given(
    dense=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    costs=st.lists(st.integers(1, 60), min_size=6, max_size=6),
    sparsity=st.floats(0.01, 0.99),
    step=st.floats(0.02, 0.6),
    seed=SEEDS,
)
def test_budget_is_met_to_less_than_the_cheapest_unit_left(
    dense: list[int], costs: list[int], sparsity: float, step: float, seed: int
) -> None:
    costs = costs[: len(dense)]
    total = sum(count * cost for count, cost in zip(dense, costs, strict=True))
    budget = round(sparsity * total)
    units = rounds_of(Anywhere(budget, dense, costs), dense, round_shares(sparsity, step), seed)
    left = sum(count * cost for count, cost in zip(units, costs, strict=True))
    removed = total - left
    assert removed <= budget
    remaining = [cost for count, cost in zip(units, costs, strict=True) if count]
    assert not remaining or budget - removed < min(remaining)


@given(
    widths=st.lists(
        st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=6,
    ),
    step=st.floats(0.05, 0.5),
    seed=SEEDS,
)
def test_given_widths_are_reached_exactly(
    widths: list[tuple[int, int]], step: float, seed: int
) -> None:
    dense, final = [list(each) for each in zip(*widths, strict=True)]
    assert rounds_of(Exactly(final, dense), dense, round_shares(0.5, step), seed) == final


@given(
    units=st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 50)), min_size=1, max_size=30),
    budget=st.integers(0, 400),
)
def test_fill_never_overspends_and_leaves_less_than_one_unit(
    units: list[tuple[float, int]], budget: int
) -> None:
    score_M = torch.tensor([score for score, _ in units])
    cost_M = torch.tensor([cost for _, cost in units])
    taken_M = fill(score_M, cost_M, budget)
    spent = int(cost_M[taken_M].sum())
    assert spent <= budget
    if not taken_M.all():
        assert budget - spent < int(cost_M[~taken_M].min())


def test_fill_takes_the_least_useful_parameters_first() -> None:
    # A head that is worth ten times a channel and costs twenty times as much goes first.
    score_M, cost_M = torch.tensor([10.0, 1.0, 1.0]), torch.tensor([20, 1, 1])
    assert fill(score_M, cost_M, 20).tolist() == [True, False, False]
    assert fill(score_M, cost_M, 19).tolist() == [False, True, True]


def test_rounds_never_remove_more_than_a_step() -> None:
    assert round_shares(0.5, 0.05)[-1] == 1.0
    assert len(round_shares(0.5, 0.05)) == 10
    assert round_shares(0.12, 0.05) == [0.05 / 0.12, 0.1 / 0.12, 1.0]
    assert round_shares(0.03, 0.05) == [1.0]


GENERATOR = torch.Generator().manual_seed(0)


def moments_of(x_NI: Tensor) -> InputMoments:
    return InputMoments(x_NI.abs().mean(0), x_NI.mean(0), x_NI.square().mean(0))


def brute_force(prior: Prior, x_NI: Tensor, w_OI: Tensor, columns: list[int]) -> float:
    scores = []
    for j in columns:
        column, inputs = w_OI[:, j].double(), x_NI[:, j].double()
        scores.append(
            {
                "wanda": column.abs().mean() * inputs.square().mean().sqrt(),
                "magnitude": inputs.abs().mean(),
                "fluctuation": inputs.var(correction=0) * column.square().sum(),
            }[prior]
        )
    return float(sum(scores)) / len(scores)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("prior", ["wanda", "magnitude", "fluctuation"])
def test_priors_equal_their_formulas(prior: Prior, columns: int) -> None:
    x_NI = torch.randn(50, 12) + 0.5
    w_OI = torch.randn(5, 12)
    units = 12 // columns
    score_U = score_units(prior, moments_of(x_NI), w_OI, columns, GENERATOR)
    for unit in range(units):
        own = list(range(unit * columns, (unit + 1) * columns))
        assert score_U[unit] == pytest.approx(brute_force(prior, x_NI, w_OI, own), rel=1e-4)


@pytest.mark.parametrize("prior", ["wanda", "magnitude", "fluctuation"])
def test_priors_follow_a_permutation_of_the_units(prior: Prior) -> None:
    x_NI, w_OI, order = torch.randn(50, 9), torch.randn(4, 9), torch.randperm(9)
    score_U = score_units(prior, moments_of(x_NI), w_OI, 1, GENERATOR)
    permuted_U = score_units(prior, moments_of(x_NI[:, order]), w_OI[:, order], 1, GENERATOR)
    torch.testing.assert_close(permuted_U, score_U[order])


def test_priors_that_are_not_finite_suspect_all_units_alike() -> None:
    x_NI = torch.randn(20, 3)
    x_NI[0, 1] = float("inf")
    score_U = score_units("wanda", moments_of(x_NI), torch.randn(4, 3), 1, GENERATOR)
    assert score_U.tolist() == [0.0, 0.0, 0.0]


def test_random_priors_come_from_the_generator() -> None:
    moments, w_OI = moments_of(torch.randn(20, 3)), torch.randn(4, 3)
    first, second, third = (
        score_units("random", moments, w_OI, 1, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_observed_inputs_are_those_of_the_sub_model(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    kept = all_units(sub_blocks)
    kept[0], kept[3] = torch.arange(0), torch.tensor([1, 5, 40])
    seen: list[Tensor] = []
    ids = torch.arange(4, 36).view(2, 16)
    with torch.no_grad(), narrowed(blocks, sub_blocks, kept):
        output = blocks[1].get_submodule(sub_blocks[3].output)
        handle = output.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        with observed_moments(blocks, sub_blocks) as moments:
            model(ids)
        handle.remove()
    found = moments()
    x_NI = seen[0].flatten(0, 1)
    assert len(found[0].mean_I) == 0
    torch.testing.assert_close(found[3].mean_I, x_NI.mean(0))
    torch.testing.assert_close(found[3].square_I, x_NI.square().mean(0))
    assert output_weight(blocks, sub_blocks[3], kept[3]).shape == (32, 3)
    nothing_OI = output_weight(blocks, sub_blocks[0], kept[0])
    assert score_units("wanda", found[0], nothing_OI, 8, GENERATOR).shape == (0,)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    masks=st.integers(2, 9),
    seed=st.integers(0, 100),
)
def test_pairs_partition_the_candidates_of_every_sub_block(
    sizes: list[int], masks: int, seed: int
) -> None:
    trials = [Trial(size, (size + 1) // 2) for size in sizes]
    weights = [torch.rand(size, generator=seeded(seed)) for size in sizes]
    kept_NM = draw_masks(weights, trials, masks, seeded(seed))
    assert kept_NM.shape == (masks, sum(sizes))
    for first_M, second_M in zip(kept_NM[::2], kept_NM[1::2], strict=False):
        assert torch.equal(first_M, ~second_M)
    for mask_M in kept_NM:
        for part, trial in zip(mask_M.split(sizes), trials, strict=True):
            assert int((~part).sum()) in (trial.drawn, trial.candidates - trial.drawn)


def test_complements_give_no_new_direction() -> None:
    trials = [Trial(30, 15), Trial(20, 10)]
    weights = [torch.rand(30), torch.rand(20)]
    design_NM = draw_masks(weights, trials, 16, seeded()).double()
    assert torch.linalg.matrix_rank(design_NM - design_NM.mean(0)) == 8
    assert torch.linalg.matrix_rank(design_NM[::2] - design_NM[::2].mean(0)) == 7


def test_draws_follow_their_weights() -> None:
    weight_C = torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen_DC = sample_without_replacement(weight_C, 1, 20_000, seeded())
    torch.testing.assert_close(
        chosen_DC.double().mean(0), weight_C.double() / 10, atol=0.015, rtol=0
    )


def test_second_draws_are_those_of_an_urn_without_the_first() -> None:
    weight_C = torch.tensor([1.0, 2.0, 5.0])
    chosen_DC = sample_without_replacement(weight_C, 2, 20_000, seeded())
    p = weight_C / 8
    left_out = 1 - chosen_DC.double().mean(0)
    # The first candidate stays if the two others are drawn, in either order.
    expected = p[1] * p[2] / (1 - p[1]) + p[2] * p[1] / (1 - p[2])
    assert abs(left_out[0] - expected) < 0.015


def test_equal_priors_can_all_be_drawn() -> None:
    prior_U = torch.zeros(6)
    weight_C = sampling_weights(prior_U, lowest(prior_U, 4))
    chosen_DC = sample_without_replacement(weight_C, 2, 500, seeded())
    assert bool(chosen_DC.any(0).all())
    assert chosen_DC.sum(1).eq(2).all()


def test_one_unit_alone_is_no_special_case() -> None:
    prior_U = torch.tensor([0.7])
    weight_C = sampling_weights(prior_U, lowest(prior_U, 1))
    kept_NM = draw_masks([weight_C], [Trial(1, 1)], 2, seeded())
    assert sorted(kept_NM.tolist()) == [[False], [True]]


def test_single_candidates_of_several_sub_blocks_can_be_told_apart() -> None:
    # Grouped queries often leave one group of a few as the only candidate of its block.
    trials = [Trial(1, 1)] * 8
    weights = [torch.ones(1)] * 8
    design_NM = draw_masks(weights, trials, 64, seeded()).double()
    assert torch.linalg.matrix_rank(design_NM - design_NM.mean(0)) == 8
    # Neither mask of a pair is the poorer one.
    assert abs(float(design_NM[::2].mean()) - 0.5) < 0.1


def test_lowest_come_first_and_ties_go_by_position() -> None:
    assert lowest(torch.tensor([2.0, 1.0, 0.5, 1.0]), 3).tolist() == [2, 1, 3]
