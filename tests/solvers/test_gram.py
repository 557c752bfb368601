"""Gram matrices that may be singular, and numbers that are refused."""

from __future__ import annotations

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.solvers.gram import check_finite, damped_cholesky, live_columns, mean_diagonal
from solvers.problems import make_problem


def test_the_factor_is_that_of_the_damped_matrix() -> None:
    _, gram_II = make_problem()
    factor = damped_cholesky(gram_II, 0.01)
    damped_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    torch.testing.assert_close(factor.lower_II @ factor.lower_II.T, damped_II)
    assert factor.damping == 0.01
    assert not factor.notes


def test_dead_columns_do_not_change_the_rest() -> None:
    _, gram_II = make_problem(dead=(0, 7, 47))
    live_I = live_columns(gram_II)
    assert (~live_I).nonzero().flatten().tolist() == [0, 7, 47]
    lower_II = damped_cholesky(gram_II, 0.01).lower_II
    alone_II = damped_cholesky(gram_II[live_I][:, live_I], 0.01).lower_II
    torch.testing.assert_close(lower_II[live_I][:, live_I], alone_II)
    assert not lower_II[live_I][:, ~live_I].any()


@pytest.mark.parametrize("damping", [0.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_matrix_gets_a_larger_damping_and_a_note(
    damping: float, dtype: torch.dtype, scale: float
) -> None:
    _, gram_II = make_problem(tokens=10)
    factor = damped_cholesky((gram_II * scale).to(dtype), damping)
    assert factor.lower_II.dtype == dtype
    assert factor.lower_II.isfinite().all()
    if dtype == torch.float32 or damping == 0:
        assert factor.damping > damping
        assert "damping raised" in factor.notes[0]


def test_noise_below_zero_is_damped_away() -> None:
    gram_II = torch.eye(8) - 0.02 * torch.ones(8, 8)
    gram_II -= 0.9 * torch.eye(8)  # smallest eigenvalue -0.06 of a mean diagonal of 0.08
    factor = damped_cholesky(gram_II, 0.01)
    assert factor.damping == 1.0
    assert factor.notes


def test_a_matrix_of_zeros_has_a_factor() -> None:
    factor = damped_cholesky(torch.zeros(4, 4), 0.0)
    assert torch.equal(factor.lower_II, torch.eye(4))
    assert mean_diagonal(torch.zeros(4, 4)) == 1


def test_what_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(SecateurError, match="positive semidefinite"):
        damped_cholesky(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01)
    with pytest.raises(SecateurError, match="NaN"):
        damped_cholesky(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), 0.01)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    check_finite("the weights", torch.zeros(3))
    with pytest.raises(SecateurError, match="the weights"):
        check_finite("the weights", torch.tensor([0.0, value, 1.0]))
