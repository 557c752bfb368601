"""Values that are not finite are refused by name."""

from __future__ import annotations

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.solvers.finite import check_finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    check_finite("the weights", torch.zeros(3))
    with pytest.raises(SecateurError, match="the weights"):
        check_finite("the weights", torch.tensor([0.0, value, 1.0]))
