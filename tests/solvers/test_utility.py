"""Regression of utilities: exact where it can be, calm where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.solvers.utility import fit_utilities, fit_with_prior


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_masks(count: int, columns: int, seed: int = 0) -> Tensor:
    return (normal(count, columns, seed=seed) > 0).double()


def paired_masks(count: int, columns: int) -> Tensor:
    half_NM = random_masks(count // 2, columns)
    return torch.cat([half_NM, 1 - half_NM])


def correlation(a_M: Tensor, b_M: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a_M, b_M]))[0, 1])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    columns=st.integers(1, 20),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.sampled_from([0.0, -3.0, 1e3]),
)
def test_additive_utilities_are_recovered(
    seed: int, columns: int, scale: float, shift: float
) -> None:
    design_NM = random_masks(60, columns, seed)
    truth_M = scale * normal(columns, seed=seed + 1)
    fit = fit_utilities(design_NM, design_NM @ truth_M + scale * shift)
    torch.testing.assert_close(fit.coefficients_M, truth_M, rtol=1e-5, atol=1e-6 * scale)
    assert fit.intercept == pytest.approx(scale * shift, rel=1e-5, abs=1e-5 * scale)
    assert fit.left_out_N.abs().max() < 1e-4 * scale
    assert not fit.clipped_N.any()


def test_strong_columns_are_as_strong_as_they_are() -> None:
    design_NM = random_masks(120, 40)
    weak_M = normal(40, seed=1)
    strong_M = weak_M.clone()
    strong_M[:4] *= 100
    weak = fit_utilities(design_NM, design_NM @ weak_M).coefficients_M
    strong = fit_utilities(design_NM, design_NM @ strong_M).coefficients_M
    torch.testing.assert_close(strong[:4], 100 * weak[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strong[4:], weak[4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [30, 400])
def test_shift_and_scale_of_utilities_carry_over(columns: int) -> None:
    design_NM = random_masks(100, columns)
    utilities_N = design_NM @ normal(columns, seed=1) + 0.3 * normal(100, seed=2)
    plain = fit_utilities(design_NM, utilities_N)
    moved = fit_utilities(design_NM, -7 * utilities_N + 40)
    torch.testing.assert_close(
        moved.coefficients_M, -7 * plain.coefficients_M, rtol=1e-3, atol=1e-4
    )
    assert moved.intercept == pytest.approx(-7 * plain.intercept + 40)


def test_noise_is_shrunk_away() -> None:
    design_NM = random_masks(100, 300)
    utilities_N = normal(100, seed=3)
    fit = fit_utilities(design_NM, utilities_N)
    predicted_N = design_NM @ fit.coefficients_M + fit.intercept
    assert predicted_N.var() < 0.2 * utilities_N.var()


def test_pairs_of_complements_leave_half_the_directions() -> None:
    design_NM = paired_masks(200, 300)
    assert torch.linalg.matrix_rank(design_NM - design_NM.mean(0)) == 100
    truth_M = normal(300, seed=1)
    truth_M[:2] = 150
    found_M = fit_utilities(design_NM, design_NM @ truth_M).coefficients_M
    # A few strong columns show; the many weak ones do not.
    assert found_M.abs().topk(2).indices.sort().values.tolist() == [0, 1]
    assert (found_M[:2] < 0.8 * truth_M[:2]).all()
    assert correlation(found_M[2:], truth_M[2:]) < 0.5


@pytest.mark.parametrize("columns", [30, 200])
@pytest.mark.parametrize("bad", [1e8, -1e8, math.inf, math.nan])
def test_models_that_fell_apart_do_not_spoil_the_fit(columns: int, bad: float) -> None:
    design_NM = random_masks(150, columns)
    truth_M = normal(columns, seed=1)
    truth_M[:5] *= 30
    utilities_N = design_NM @ truth_M + normal(150, seed=2)
    clean = fit_utilities(design_NM, utilities_N)
    broken = [3, 50, 51, 149]
    spoiled_N = utilities_N.clone()
    spoiled_N[broken] = bad
    fit = fit_utilities(design_NM, spoiled_N)
    # With more columns than observations each one that is lost is missed.
    agreement = 0.999 if columns == 30 else 0.85
    assert correlation(fit.coefficients_M, clean.coefficients_M) > agreement
    if math.isnan(bad):
        assert fit.left_out_N[broken].isnan().all()
    elif math.isfinite(bad):
        assert fit.clipped_N.nonzero().flatten().tolist() == broken


def test_left_out_residuals_are_those_of_leaving_out() -> None:
    design_NM = random_masks(30, 8)
    utilities_N = design_NM @ normal(8, seed=1) + 0.1 * normal(30, seed=2)
    fit = fit_utilities(design_NM, utilities_N)
    assert not fit.clipped_N.any()
    for row in range(30):
        rest = [other for other in range(30) if other != row]
        one_N1 = torch.ones(30, 1, dtype=torch.float64)
        full_NM = torch.cat([design_NM, one_N1], 1)
        solved = torch.linalg.lstsq(full_NM[rest], utilities_N[rest, None]).solution
        expected = utilities_N[row] - full_NM[row] @ solved[:, 0]
        assert float(fit.left_out_N[row]) == pytest.approx(float(expected), abs=0.05)


def test_the_same_utility_for_all_is_the_intercept() -> None:
    fit = fit_utilities(random_masks(10, 4), torch.full((10,), 2.5))
    torch.testing.assert_close(fit.coefficients_M, torch.zeros(4, dtype=torch.float64))
    assert fit.intercept == pytest.approx(2.5)


def test_the_order_of_observations_does_not_matter() -> None:
    design_NM = random_masks(50, 80)
    utilities_N = design_NM @ normal(80, seed=1) + normal(50, seed=2)
    order_N = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        fit_utilities(design_NM[order_N], utilities_N[order_N]).coefficients_M,
        fit_utilities(design_NM, utilities_N).coefficients_M,
    )


def test_with_little_data_the_prior_rules_and_is_scaled() -> None:
    prior_K = normal(40, seed=1).exp()
    design_NK = normal(6, 40, seed=2).abs()
    fit = fit_with_prior(design_NK, design_NK @ (3 * prior_K), prior_K)
    torch.testing.assert_close(fit.coefficients_M, 3 * prior_K)
    noisy = fit_with_prior(design_NK, design_NK @ (3 * prior_K) + normal(6, seed=3), prior_K)
    assert correlation(noisy.coefficients_M, prior_K) > 0.95


def test_with_much_data_each_column_gets_its_own_scale() -> None:
    prior_K = normal(20, seed=1).exp()
    truth_K = prior_K * normal(20, seed=2).exp()
    design_NK = normal(200, 20, seed=3).abs()
    fit = fit_with_prior(design_NK, design_NK @ truth_K + 5, prior_K)
    torch.testing.assert_close(fit.coefficients_M, truth_K, rtol=1e-4, atol=1e-4)
    assert fit.intercept == pytest.approx(5, rel=1e-4)


def test_a_prior_helps_where_observations_are_few_and_noisy() -> None:
    prior_K = normal(60, seed=1).exp()
    truth_K = 2 * prior_K * (1 + 0.3 * normal(60, seed=2))
    design_NK = normal(50, 60, seed=3).abs()
    utilities_N = design_NK @ truth_K
    utilities_N += 0.3 * utilities_N.std() * normal(50, seed=4)
    with_prior = fit_with_prior(design_NK, utilities_N, prior_K).coefficients_M
    without = fit_utilities(design_NK, utilities_N).coefficients_M
    assert (with_prior - truth_K).norm() < 0.6 * (without - truth_K).norm()


def test_without_intercept_nothing_cut_costs_nothing() -> None:
    prior_K = normal(8, seed=1).exp()
    design_NK = normal(40, 8, seed=2).abs()
    fit = fit_with_prior(design_NK, design_NK @ prior_K, prior_K, intercept=False)
    torch.testing.assert_close(fit.coefficients_M, prior_K, rtol=1e-6, atol=1e-6)
    assert fit.intercept == 0


def test_what_the_prior_rules_out_stays_out() -> None:
    prior_K = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    design_NK = normal(40, 3, seed=2).abs()
    fit = fit_with_prior(design_NK, design_NK.sum(1), prior_K)
    assert fit.coefficients_M[1] == 0
    silent = fit_with_prior(design_NK, design_NK.sum(1), 0 * prior_K)
    assert not silent.coefficients_M.any()


def test_what_cannot_be_fitted_is_refused() -> None:
    design_NM = random_masks(4, 3)
    with pytest.raises(SecateurError, match="1 of 4 utilities"):
        fit_utilities(design_NM, torch.tensor([1.0, math.nan, math.inf, math.nan]))
    with pytest.raises(SecateurError, match="design"):
        fit_utilities(design_NM * math.nan, torch.ones(4))
    with pytest.raises(SecateurError, match="prior"):
        fit_with_prior(design_NM, torch.ones(4), torch.full((3,), math.inf))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("columns", [1, 2, 9])
def test_very_few_observations_stay_finite(count: int, columns: int) -> None:
    design_NM = random_masks(count, columns)
    utilities_N = normal(count, seed=1)
    for fit in (
        fit_utilities(design_NM, utilities_N),
        fit_with_prior(design_NM, utilities_N, torch.ones(columns)),
        fit_with_prior(design_NM, utilities_N, torch.ones(columns), intercept=False),
    ):
        assert fit.coefficients_M.isfinite().all()
        assert math.isfinite(fit.intercept)
        assert fit.left_out_N.isfinite().all()
