"""Rates and counts against exact arithmetic."""

from __future__ import annotations

import itertools
import math
import weakref
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runs.errors import SecateurError
from secateur.solvers.rates import (
    candidate_counts,
    candidate_rates,
    exact_counts,
    expected_rate,
    mean_rate,
    rate_distribution,
    reachable_rates,
    sparsity_penalty,
    truncated_counts,
)


def test_candidates_descend_from_one_to_zero() -> None:
    rates = candidate_rates()
    assert len(rates) == 101
    assert rates[0] == 1 and rates[-1] == 0 and rates[30] == Fraction(7, 10)
    assert candidate_rates(0.3) == (1, Fraction(7, 10), Fraction(2, 5), Fraction(1, 10), 0)
    assert candidate_rates(1.0) == (1, 0)
    for step in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(SecateurError, match="step"):
            candidate_rates(step)


@given(columns=st.integers(1, 40_000), step=st.sampled_from([0.01, 0.05, 0.03, 0.001]))
def test_candidate_counts_are_whole_parts(columns: int, step: float) -> None:
    rates = candidate_rates(step)
    counts = candidate_counts(rates, columns)
    assert counts[0] == columns and counts[-1] == 0
    assert all(more >= fewer for more, fewer in itertools.pairwise(counts))
    assert counts == [columns * rate.numerator // rate.denominator for rate in rates]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("step", [0.01, 0.05, 0.001])
def test_zero_logits_give_exactly_one_half(smooth: bool, step: float) -> None:
    rates = candidate_rates(step)
    beta_GD = rate_distribution(torch.zeros(3, len(rates)), smooth=smooth)
    alpha_G = expected_rate(beta_GD, rates)
    assert alpha_G.dtype == torch.float32
    assert alpha_G.tolist() == [0.5] * 3


@pytest.mark.parametrize("smooth", [True, False])
def test_a_distribution_has_the_gradient_of_a_softmax_and_is_not_kept_for_it(smooth: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    theta_GD, weight_GD = torch.randn(2, 5, 11, dtype=torch.float64, generator=generator)
    plain_GD = theta_GD.clone().requires_grad_()
    beta_GD = torch.softmax(plain_GD.sigmoid() if smooth else plain_GD, dim=-1)
    (beta_GD * weight_GD).sum().backward()

    beta_GD = rate_distribution(theta_GD.requires_grad_(), smooth=smooth)
    storage = weakref.ref(beta_GD.untyped_storage())
    total = (beta_GD * weight_GD).sum()
    del beta_GD
    assert storage() is None
    total.backward()
    torch.testing.assert_close(theta_GD.grad, plain_GD.grad)


@pytest.mark.parametrize("step", [0.01, 0.05])
def test_the_sigmoid_confines_the_expected_rate(step: float) -> None:
    rates = candidate_rates(step)
    low, high = reachable_rates(rates, smooth=True)
    if step == 0.01:
        assert (low, high) == (pytest.approx(0.3763, abs=1e-4), pytest.approx(0.6237, abs=1e-4))
    cuts = torch.ones(len(rates), len(rates)).tril() * 2 - 1
    alpha_G = expected_rate(rate_distribution(cuts * 1e4, smooth=True), rates)
    assert float(alpha_G.max()) == pytest.approx(high, abs=1e-6)
    alpha_G = expected_rate(rate_distribution(-cuts * 1e4, smooth=True), rates)
    assert float(alpha_G.min()) == pytest.approx(low, abs=1e-6)
    random = torch.randn(200, len(rates), generator=torch.Generator().manual_seed(0)) * 50
    alpha_G = expected_rate(rate_distribution(random, smooth=True), rates)
    assert low - 1e-6 <= float(alpha_G.min()) and float(alpha_G.max()) <= high + 1e-6


def test_without_the_sigmoid_every_rate_can_be_reached() -> None:
    rates = candidate_rates()
    assert reachable_rates(rates, smooth=False) == (0, 1)
    alpha_G = expected_rate(rate_distribution(torch.eye(101) * 1e3, smooth=False), rates)
    torch.testing.assert_close(alpha_G, torch.tensor([float(rate) for rate in rates]))


def test_counts_are_truncated_and_shared_by_rows() -> None:
    alpha_G = torch.tensor([0.5, 0.999, 0.0, 1.0])
    assert truncated_counts(alpha_G, 8, 7).tolist() == [3, 3, 6, 6, 0, 0, 7, 7]
    with pytest.raises(SecateurError, match="evenly"):
        truncated_counts(alpha_G, 6, 7)


@pytest.mark.parametrize("target", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("smooth", [True, False])
def test_the_penalty_alone_brings_the_rate_to_its_target(target: float, smooth: bool) -> None:
    rates = candidate_rates(0.05)
    theta = [torch.zeros(4, len(rates)).requires_grad_(), torch.zeros(1, len(rates))]
    theta[1].requires_grad_()
    optimiser = torch.optim.Adam(theta, lr=0.1)
    for _ in range(300):
        alphas = [expected_rate(rate_distribution(t, smooth=smooth), rates) for t in theta]
        rate = mean_rate(alphas, [12, 36])
        optimiser.zero_grad()
        sparsity_penalty(rate, target, 5.0).backward()
        optimiser.step()
    assert float(rate.detach()) == pytest.approx(target, abs=2e-3)


def test_the_mean_rate_weighs_linears_by_their_size() -> None:
    rate = mean_rate([torch.tensor([0.2, 0.4]), torch.tensor([0.9])], [10, 30])
    assert float(rate) == pytest.approx(0.75)


def test_a_penalty_without_target_is_refused() -> None:
    with pytest.raises(SecateurError, match="target"):
        sparsity_penalty(torch.tensor(0.5), 0.0, 5.0)


rows = st.lists(
    st.tuples(st.floats(-2, 3, allow_nan=False), st.integers(1, 999)), min_size=1, max_size=40
)


@settings(max_examples=200)
@given(rows=rows, share=st.floats(0, 1))
def test_exact_counts_add_up_and_follow_the_rates(
    rows: list[tuple[float, int]], share: float
) -> None:
    rate_R = torch.tensor([rate for rate, _ in rows])
    columns_R = torch.tensor([columns for _, columns in rows])
    total = round(share * int(columns_R.sum()))
    count_R = exact_counts(rate_R, columns_R, total)
    assert count_R.dtype == torch.int64
    assert int(count_R.sum()) == total
    assert bool((count_R >= 0).all()) and bool((count_R <= columns_R).all())
    assert torch.equal(count_R, exact_counts(rate_R, columns_R, total))
    # One shift explains all of them to less than a weight.
    rate = rate_R.double()
    low = torch.where(count_R > 0, (count_R - 1) / columns_R - rate, -torch.inf).max()
    high = torch.where(count_R < columns_R, (count_R + 1) / columns_R - rate, torch.inf).min()
    assert low <= high + 1e-9
    # At equal widths a higher rate never has fewer zeros.
    for first, second in itertools.combinations(range(len(rows)), 2):
        if columns_R[first] == columns_R[second] and rate_R[first] > rate_R[second]:
            assert count_R[first] >= count_R[second]


def test_exact_counts_of_equal_rates_differ_by_one_and_ties_go_by_position() -> None:
    count_R = exact_counts(torch.full((4,), 0.3), torch.full((4,), 7), 15)
    assert count_R.tolist() == [4, 4, 4, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_counts_that_already_fit_stay(dtype: torch.dtype) -> None:
    rate_R = torch.tensor([0.25, 0.75, 0.5, 0.0, 1.0], dtype=dtype)
    count_R = exact_counts(rate_R, torch.tensor([8, 8, 576, 5, 3]), 299)
    assert count_R.tolist() == [2, 6, 288, 0, 3]


def test_rates_far_apart_fill_rows_one_after_the_other() -> None:
    rate_R = torch.tensor([1e30, 0.0, -1e30])
    columns_R = torch.tensor([10, 10, 10])
    assert exact_counts(rate_R, columns_R, 15).tolist() == [10, 5, 0]


def test_impossible_counts_are_refused() -> None:
    columns_R = torch.tensor([3, 4])
    for total in (-1, 8):
        with pytest.raises(SecateurError, match="do not fit"):
            exact_counts(torch.zeros(2), columns_R, total)
    with pytest.raises(SecateurError, match="NaN or infinite"):
        exact_counts(torch.tensor([0.0, math.nan]), columns_R, 3)
