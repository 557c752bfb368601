"""Refit against least squares solved row by row in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns.pattern import NM, Budget, Pattern, Unstructured, select
from secateur.runs.errors import SecateurError
from secateur.solvers.refit import refit
from secateur.solvers.scores import wanda_score
from secateur.solvers.sparsegpt import sparsegpt
from solvers.problems import make_problem, quadratic_error


def wanda_mask(w_OI: Tensor, gram_II: Tensor, pattern: Pattern | None = None) -> Tensor:
    budget = Budget.uniform(pattern or Unstructured(0.5), [len(w_OI)], w_OI.shape[1])
    return select(wanda_score(w_OI, gram_II.diagonal()), budget)


def row_by_row(w_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, damping: float) -> Tensor:
    """Least squares of minimal norm on each row's support."""
    h_II = gram_II + damping * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    fitted_OI = torch.zeros_like(w_OI)
    for w_I, mask_I, fitted_I in zip(w_OI, mask_OI, fitted_OI, strict=True):
        fitted_I[mask_I] = torch.linalg.lstsq(
            h_II[mask_I][:, mask_I], h_II[mask_I] @ w_I, driver="gelsd"
        ).solution
    return fitted_OI


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.9), NM(2, 4)])
@pytest.mark.parametrize("damping", [0.0, 0.03, 1.0])
def test_rows_are_least_squares_solutions(pattern: Pattern, damping: float) -> None:
    w_OI, gram_II = make_problem()
    mask_OI = wanda_mask(w_OI, gram_II, pattern)
    fitted_OI = refit(w_OI, mask_OI, gram_II, damping=damping, iterations=500, tolerance=0)
    expected_OI = row_by_row(w_OI, mask_OI, gram_II, damping)
    torch.testing.assert_close(fitted_OI, expected_OI, rtol=1e-6, atol=1e-8)
    assert torch.equal(fitted_OI != 0, mask_OI)


def test_a_singular_gram_matrix_is_fitted_as_well_as_it_can_be() -> None:
    w_OI, gram_II = make_problem(tokens=30)
    mask_OI = wanda_mask(w_OI, gram_II)
    exact_OI = row_by_row(w_OI, mask_OI, gram_II, 0.0)
    fitted_OI = refit(w_OI, mask_OI, gram_II, damping=0.0, iterations=500, tolerance=0)
    torch.testing.assert_close(
        quadratic_error(fitted_OI - w_OI, gram_II),
        quadratic_error(exact_OI - w_OI, gram_II),
        rtol=1e-6,
        atol=1e-12,
    )


def test_few_iterations_in_float32_come_close() -> None:
    w_OI, gram_II = make_problem(rows=32, width=256, tokens=2000)
    mask_OI = wanda_mask(w_OI, gram_II)
    best = quadratic_error(row_by_row(w_OI, mask_OI, gram_II, 0.03) - w_OI, gram_II).sum()
    masked = quadratic_error(w_OI * mask_OI - w_OI, gram_II).sum()
    fitted_OI = refit(w_OI.float(), mask_OI, gram_II.float())
    assert fitted_OI.dtype == torch.float32
    found = quadratic_error(fitted_OI.double() - w_OI, gram_II).sum()
    assert found - best < 0.02 * (masked - best)


@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([1, 5, 40, 400]),
    sparsity=st.floats(0, 1),
    damping=st.sampled_from([0.0, 1e-6, 0.03, 10.0]),
    iterations=st.integers(0, 60),
    start=st.sampled_from([None, "noise", "sparsegpt"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_row_gets_worse_and_zeros_stay(
    seed: int,
    tokens: int,
    sparsity: float,
    damping: float,
    iterations: int,
    start: str | None,
    dtype: torch.dtype,
) -> None:
    w_OI, gram_II = make_problem(8, 24, tokens, seed, dead=(5,), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    mask_OI = torch.rand(8, 24, generator=generator) >= sparsity
    start_OI = None
    if start == "noise":
        start_OI = w_OI + torch.randn(8, 24, generator=generator, dtype=dtype)
    elif start == "sparsegpt":
        solution = sparsegpt(w_OI, gram_II, Budget.uniform(Unstructured(0.5), [8], 24))
        start_OI, mask_OI = solution.w_OI, solution.mask_OI
    fitted_OI = refit(
        w_OI, mask_OI, gram_II, damping=damping, iterations=iterations, start_OI=start_OI
    )
    assert fitted_OI.dtype == dtype
    assert not fitted_OI[~mask_OI].any()
    assert fitted_OI.isfinite().all()
    first_OI = (w_OI if start_OI is None else start_OI) * mask_OI
    gram_II, w_OI = gram_II.double(), w_OI.double()
    ridge_I = torch.full((24,), damping)
    ridge_I[gram_II.diagonal() == 0] = max(damping, 1)
    objective_II = gram_II + torch.diag(ridge_I * gram_II.diagonal().sum() / 23)
    before_O = quadratic_error(first_OI.double() - w_OI, objective_II)
    after_O = quadratic_error(fitted_OI.double() - w_OI, objective_II)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    slack_O = rounding * (before_O + quadratic_error(w_OI, objective_II))
    assert (after_O <= before_O + slack_O).all()


def test_rows_with_everything_or_nothing_kept() -> None:
    w_OI, gram_II = make_problem(rows=3)
    mask_OI = wanda_mask(w_OI, gram_II)
    mask_OI[0], mask_OI[1] = True, False
    fitted_OI = refit(w_OI, mask_OI, gram_II)
    torch.testing.assert_close(fitted_OI[0], w_OI[0])
    assert not fitted_OI[1].any()
    assert fitted_OI[2].any()


def test_dead_columns_keep_their_dense_weights() -> None:
    w_OI, gram_II = make_problem(dead=(2, 9))
    mask_OI = torch.ones_like(w_OI, dtype=torch.bool)
    mask_OI[:, 10:30] = False
    for damping in (0.0, 0.03):
        fitted_OI = refit(w_OI, mask_OI, gram_II, damping=damping)
        torch.testing.assert_close(fitted_OI[:, [2, 9]], w_OI[:, [2, 9]])


def test_stacked_linears_do_not_see_each_other() -> None:
    w_OI, gram_II = make_problem()
    mask_OI = wanda_mask(w_OI, gram_II)
    parts = [
        refit(w, mask, gram_II)
        for w, mask in zip(w_OI.split((7, 17)), mask_OI.split((7, 17)), strict=True)
    ]
    torch.testing.assert_close(refit(w_OI, mask_OI, gram_II), torch.cat(parts))


def test_scale_of_inputs_does_not_matter() -> None:
    w_OI, gram_II = make_problem(dtype=torch.float32)
    mask_OI = wanda_mask(w_OI, gram_II)
    fitted_OI = refit(w_OI, mask_OI, gram_II)
    for scale in (1e-20, 1e20):
        torch.testing.assert_close(refit(w_OI, mask_OI, gram_II * scale), fitted_OI)


def test_arguments_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem()
    mask_OI = wanda_mask(w_OI, gram_II)
    start_OI = w_OI + 1
    before = [tensor.clone() for tensor in (w_OI, mask_OI, gram_II, start_OI)]
    refit(w_OI, mask_OI, gram_II, start_OI=start_OI)
    for tensor, copy in zip((w_OI, mask_OI, gram_II, start_OI), before, strict=True):
        assert torch.equal(tensor, copy)


def test_values_that_are_not_finite_are_refused() -> None:
    w_OI, gram_II = make_problem()
    mask_OI = wanda_mask(w_OI, gram_II)
    for which in range(3):
        arguments = [w_OI.clone(), gram_II.clone(), w_OI.clone()]
        arguments[which][mask_OI[: len(arguments[which])].nonzero()[0].unbind()] = torch.inf
        with pytest.raises(SecateurError, match="infinite"):
            refit(arguments[0], mask_OI, arguments[1], start_OI=arguments[2])
