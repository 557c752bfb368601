"""Elimination against brute force over sets of units in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.solvers import elimination
from secateur.solvers.elimination import eliminate, kept_first, nested_losses
from solvers.problems import make_problem, quadratic_error


def damped(gram_II: Tensor, damping: float) -> Tensor:
    return gram_II + damping * gram_II.diagonal().mean() * torch.eye(len(gram_II)).to(gram_II)


def brute_loss(w_OI: Tensor, h_II: Tensor, removed: list[int], unit: int) -> Tensor:
    """Least squares over the columns that are left, row by row."""
    kept_I = torch.ones(w_OI.shape[1], dtype=torch.bool)
    for q in removed:
        kept_I[q * unit : (q + 1) * unit] = False
    fitted_OI = torch.zeros_like(w_OI)
    if kept_I.any():
        fitted_OI[:, kept_I] = torch.linalg.solve(h_II[kept_I][:, kept_I], h_II[kept_I] @ w_OI.T).T
    return quadratic_error(w_OI - fitted_OI, h_II).sum()


@pytest.mark.parametrize(("width", "unit"), [(12, 1), (12, 2), (12, 4), (6, 6)])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_every_removal_is_the_cheapest_by_brute_force(
    width: int, unit: int, damping: float
) -> None:
    w_OI, gram_II = make_problem(5, width)
    h_II = damped(gram_II, damping)
    found = eliminate(w_OI, gram_II, unit, damping)
    removed: list[int] = []
    for chosen, loss in zip(found.order_U.tolist(), found.losses_U, strict=True):
        losses = {
            q: brute_loss(w_OI, h_II, [*removed, q], unit)
            for q in range(width // unit)
            if q not in removed
        }
        assert chosen == min(losses, key=losses.__getitem__)
        removed.append(chosen)
        torch.testing.assert_close(loss, losses[chosen], rtol=1e-8, atol=0)


@pytest.mark.parametrize(("unit", "groups"), [(1, 3), (2, 2), (2, 3), (1, 12)])
def test_groups_lose_units_in_rounds_and_each_is_the_cheapest_that_may_go(
    unit: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "_PENDING", 3)
    w_OI, gram_II = make_problem(5, 12)
    h_II = damped(gram_II, 0.01)
    units = 12 // unit
    found = eliminate(w_OI, gram_II, unit, groups=groups)
    removed: list[int] = []
    for chosen, loss in zip(found.order_U.tolist(), found.losses_U, strict=True):
        lost = [sum(q // (units // groups) == group for q in removed) for group in range(groups)]
        losses = {
            q: brute_loss(w_OI, h_II, [*removed, q], unit)
            for q in range(units)
            if q not in removed and lost[q // (units // groups)] == min(lost)
        }
        assert chosen == min(losses, key=losses.__getitem__)
        removed.append(chosen)
        torch.testing.assert_close(loss, losses[chosen], rtol=1e-8, atol=0)


def test_greedy_is_close_to_the_best_subset() -> None:
    w_OI, gram_II = make_problem(5, 10)
    losses_U = eliminate(w_OI, gram_II).losses_U
    h_II = damped(gram_II, 0.01)
    for size in range(1, 11):
        best = min(brute_loss(w_OI, h_II, list(some), 1) for some in combinations(range(10), size))
        assert best * (1 - 1e-9) <= losses_U[size - 1] <= 1.2 * best


@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([1, 7, 60]),
    unit=st.sampled_from([1, 2, 3, 8]),
    damping=st.sampled_from([0.0, 1e-6, 0.01, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_gram_matrix_gives_a_whole_order_and_finite_rising_losses(
    seed: int, tokens: int, unit: int, damping: float, dtype: torch.dtype
) -> None:
    w_OI, gram_II = make_problem(6, 24, tokens, seed, dead=(0, 1, 2, 9), dtype=dtype)
    found = eliminate(w_OI, gram_II, unit, damping)
    assert found.order_U.sort().values.tolist() == list(range(24 // unit))
    assert found.losses_U.isfinite().all()
    assert (found.losses_U.diff() >= 0).all()
    rise = eliminate(w_OI.double(), gram_II.double(), unit, damping).losses_U[-1]
    torch.testing.assert_close(found.losses_U[-1], rise, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_that_are_always_zero_go_first_and_cost_nothing(dtype: torch.dtype) -> None:
    w_OI, gram_II = make_problem(6, 24, dead=(3, 8, 9, 23), dtype=dtype)
    single = eliminate(w_OI, gram_II)
    assert single.order_U[:4].tolist() == [3, 8, 9, 23]
    assert not single.losses_U[:4].any()
    assert single.losses_U[4] > 0
    pairs = eliminate(w_OI, gram_II, 2)
    assert pairs.order_U[0] == 4
    assert pairs.losses_U[0] == 0


@pytest.mark.parametrize("unit", [1, 4, 24])
def test_pending_updates_change_nothing(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI, gram_II = make_problem(width=96)
    expected = eliminate(w_OI, gram_II, unit)
    for pending in (1, 7):
        monkeypatch.setattr(elimination, "_PENDING", pending)
        found = eliminate(w_OI, gram_II, unit)
        assert torch.equal(found.order_U, expected.order_U)


def test_float32_follows_float64_over_many_steps() -> None:
    w_OI, gram_II = make_problem(64, 384, 1000)
    exact = eliminate(w_OI, gram_II)
    found = eliminate(w_OI.float(), gram_II.float())
    torch.testing.assert_close(found.losses_U, exact.losses_U, rtol=2e-3, atol=0)


def test_the_order_of_the_columns_does_not_matter() -> None:
    w_OI, gram_II = make_problem(width=24)
    shuffled_U = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    columns_I = (shuffled_U[:, None] * 3 + torch.arange(3)).flatten()
    found = eliminate(w_OI[:, columns_I], gram_II[columns_I][:, columns_I], 3)
    expected = eliminate(w_OI, gram_II, 3)
    assert torch.equal(shuffled_U[found.order_U], expected.order_U)
    torch.testing.assert_close(found.losses_U, expected.losses_U)


def test_a_sum_over_tokens_and_a_mean_give_the_same_order() -> None:
    w_OI, gram_II = make_problem(dtype=torch.float32)
    expected = eliminate(w_OI, gram_II)
    for scale in (1e-12, 1e12):
        found = eliminate(w_OI, gram_II * scale)
        assert torch.equal(found.order_U, expected.order_U)
        torch.testing.assert_close(found.losses_U, expected.losses_U * scale, rtol=1e-5, atol=0)


def test_losses_of_a_given_order_are_those_of_brute_force() -> None:
    w_OI, gram_II = make_problem(5, 12)
    order_U = torch.tensor([2, 0, 3, 1])
    losses_U = nested_losses(w_OI, gram_II, order_U, 3, damping=0.1)
    h_II = damped(gram_II, 0.1)
    for count in range(1, 5):
        brute = brute_loss(w_OI, h_II, order_U[:count].tolist(), 3)
        torch.testing.assert_close(losses_U[count - 1], brute)


def test_every_width_is_a_slice() -> None:
    columns_I = kept_first(torch.tensor([1, 2, 0]), 2)
    assert columns_I.tolist() == [0, 1, 4, 5, 2, 3]


def test_arguments_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem()
    before = w_OI.clone(), gram_II.clone()
    eliminate(w_OI, gram_II)
    assert torch.equal(w_OI, before[0])
    assert torch.equal(gram_II, before[1])


def test_what_cannot_be_eliminated_is_refused() -> None:
    w_OI, gram_II = make_problem(width=12)
    with pytest.raises(SecateurError, match="units of 5"):
        eliminate(w_OI, gram_II, 5)
    with pytest.raises(SecateurError, match="weights hold NaN"):
        eliminate(w_OI * torch.nan, gram_II)
    with pytest.raises(SecateurError, match="Gram"):
        eliminate(w_OI, gram_II * torch.inf)
