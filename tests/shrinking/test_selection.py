"""Budgets are met to less than one unit, whatever the scores."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.shrinking.bonsai import round_shares
from secateur.shrinking.selection import Anywhere, Exactly, Goal, fill

SEEDS = st.integers(0, 1000)


def run_rounds(goal: Goal, dense: list[int], shares: list[float], seed: int) -> list[int]:
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
    units = run_rounds(Anywhere(budget, dense, costs), dense, round_shares(sparsity, step), seed)
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
    assert run_rounds(Exactly(final, dense), dense, round_shares(0.5, step), seed) == final


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
