"""ADMM finds better masks than the scores and than SparseGPT, within the same budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.patterns.pattern import NM, Budget, Pattern, Scope, Unstructured, check_mask, select
from secateur.runs.errors import SecateurError
from secateur.solvers.admm import admm
from secateur.solvers.refit import refit
from secateur.solvers.scores import wanda_score
from secateur.solvers.sparsegpt import sparsegpt
from solvers.problems import make_problem, quadratic_error

# The columns of these problems differ in scale a hundredfold; damping by their mean must not drown
# the small ones, whose weights are large.
_DAMPING = 1e-3


@pytest.mark.parametrize(
    ("pattern", "scope"),
    [
        (Unstructured(0.5), "row"),
        (Unstructured(0.5), "linear"),
        (Unstructured(0.7), "linear"),
        (NM(2, 4), "row"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_lower_than_that_of_the_other_solvers(
    pattern: Pattern, scope: Scope, dtype: torch.dtype
) -> None:
    wanda = surgeon = searched = 0.0
    for seed in range(3):
        w_OI, gram_II = make_problem(64, 128, tokens=1000, seed=seed, dtype=dtype)
        budget = Budget.uniform(pattern, [64], 128)
        mask_OI = select(wanda_score(w_OI, gram_II.diagonal()), budget, scope)
        fitted_OI = refit(w_OI, mask_OI, gram_II, damping=_DAMPING)
        wanda += quadratic_error(fitted_OI - w_OI, gram_II).sum().item()
        other = sparsegpt(w_OI, gram_II, budget, damping=_DAMPING)
        surgeon += quadratic_error(other.w_OI - w_OI, gram_II).sum().item()
        solution = admm(w_OI, gram_II, budget, scope=scope, damping=_DAMPING)
        assert solution.w_OI.dtype == dtype
        searched += quadratic_error(solution.w_OI - w_OI, gram_II).sum().item()
    assert searched < 0.9 * wanda
    if scope == "linear" or isinstance(pattern, NM):  # SparseGPT's rows compete with each other
        assert searched < 0.9 * surgeon


def test_more_iterations_find_better_masks() -> None:
    w_OI, gram_II = make_problem(64, 128, tokens=1000)
    budget = Budget.uniform(NM(2, 4), [64], 128)
    errors = [
        quadratic_error(admm(w_OI, gram_II, budget, iterations=n).w_OI - w_OI, gram_II).sum()
        for n in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_weights_are_the_best_for_their_mask() -> None:
    w_OI, gram_II = make_problem()
    budget = Budget.uniform(Unstructured(0.5), [24], 48)
    solution = admm(w_OI, gram_II, budget, refit_iterations=200)
    again_OI = refit(w_OI, solution.mask_OI, gram_II, iterations=200, start_OI=solution.w_OI)
    before = quadratic_error(solution.w_OI - w_OI, gram_II).sum()
    after = quadratic_error(again_OI - w_OI, gram_II).sum()
    torch.testing.assert_close(before, after, rtol=1e-3, atol=0)


@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    width=st.integers(1, 20),
    tokens=st.sampled_from([1, 10, 100]),
    pattern=st.one_of(
        st.floats(0, 0.99).map(Unstructured),
        st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 5)]).map(lambda nm: NM(*nm)),
    ),
    scope=st.sampled_from(["row", "linear"]),
    damping=st.sampled_from([0.0, 0.03]),
    seed=st.integers(0, 99),
)
def test_zeros_are_exact_for_any_shape(
    rows: list[int],
    width: int,
    tokens: int,
    pattern: Pattern,
    scope: Scope,
    damping: float,
    seed: int,
) -> None:
    if isinstance(pattern, NM):
        width *= pattern.m
    w_OI, gram_II = make_problem(sum(rows), width, tokens, seed, dtype=torch.float32)
    budget = Budget.uniform(pattern, rows, width)
    solution = admm(w_OI, gram_II, budget, scope=scope, damping=damping)
    check_mask(solution.mask_OI, budget)
    assert not solution.w_OI[~solution.mask_OI].any()
    assert solution.w_OI.isfinite().all()


def test_stacked_linears_do_not_see_each_other() -> None:
    w_OI, gram_II = make_problem()
    for pattern in (Unstructured(0.4), NM(2, 4)):
        alone = [Budget.uniform(pattern, [n], 48) for n in (7, 17)]
        budget = Budget(pattern, (7, 17), (*alone[0].zeros, *alone[1].zeros))
        stacked = admm(w_OI, gram_II, budget)
        parts = [
            admm(part, gram_II, one) for part, one in zip(w_OI.split((7, 17)), alone, strict=True)
        ]
        assert torch.equal(stacked.mask_OI, torch.cat([part.mask_OI for part in parts]))
        torch.testing.assert_close(stacked.w_OI, torch.cat([part.w_OI for part in parts]))


def test_dead_columns_go_first_and_kept_ones_stay_as_they_were() -> None:
    dead = [1, 2, 3, 40, 41, 42]
    w_OI, gram_II = make_problem(dead=tuple(dead))
    solution = admm(w_OI, gram_II, Budget.uniform(Unstructured(0.5), [24], 48))
    assert not solution.mask_OI[:, dead].any()
    solution = admm(w_OI, gram_II, Budget.uniform(NM(3, 4), [24], 48))
    kept_OI = solution.mask_OI[:, dead]
    assert kept_OI.any()
    assert torch.equal(solution.w_OI[:, dead], w_OI[:, dead] * kept_OI)


def test_inputs_without_any_signal() -> None:
    w_OI, _ = make_problem(rows=4, width=8)
    budget = Budget.uniform(Unstructured(0.5), [4], 8)
    solution = admm(w_OI, torch.zeros(8, 8, dtype=torch.float64), budget)
    check_mask(solution.mask_OI, budget)
    assert torch.equal(solution.w_OI, w_OI * solution.mask_OI)


def test_arguments_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem()
    before = w_OI.clone(), gram_II.clone()
    admm(w_OI, gram_II, Budget.uniform(NM(2, 4), [24], 48))
    assert torch.equal(w_OI, before[0])
    assert torch.equal(gram_II, before[1])


def test_bad_input_is_refused() -> None:
    w_OI, gram_II = make_problem()
    budget = Budget.uniform(Unstructured(0.5), [24], 48)
    with pytest.raises(SecateurError, match="the weights"):
        admm(w_OI.fill_(torch.nan), gram_II, budget)
    w_OI, gram_II = make_problem()
    with pytest.raises(SecateurError, match="Gram"):
        admm(w_OI, gram_II * torch.inf, budget)
    with pytest.raises(SecateurError, match="rows"):
        admm(w_OI[:-1], gram_II, budget)
