"""The quadratic error is the mean squared change of the output."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import SecateurError
from secateur.solvers.objective import check_finite, quadratic_error


def test_error_of_each_row_is_its_mean_squared_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    delta_OI = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    expected_O = (x_NI @ delta_OI.T).square().mean(0)
    torch.testing.assert_close(quadratic_error(delta_OI, x_NI.T @ x_NI / 50), expected_O)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    check_finite("the weights", torch.zeros(3))
    with pytest.raises(SecateurError, match="the weights"):
        check_finite("the weights", torch.tensor([0.0, value, 1.0]))
