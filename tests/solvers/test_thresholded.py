"""Linears without their cheap weights, and slopes at the margin, against dense autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from secateur.solvers import besa
from secateur.solvers.besa import thresholded_linear, trained_linear
from secateur.solvers.margin import RowCosts
from solvers.row_costs import all_costs, random_costs, two_rows


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(besa, "row_chunks", two_rows)


def slopes(costs: RowCosts, threshold: float, w_OI: Tensor, gradient_OI: Tensor) -> Tensor:
    """Mean over each row's margin, one row after the other."""
    rise_OI = all_costs(costs).square() / threshold**2
    near_OI = (rise_OI > 1 / 1.5) & (rise_OI < 1.5)
    assert near_OI.sum(1).tolist()[-1] == 0 and bool(near_OI.sum(1)[:4].all())
    return torch.stack(
        [slope[near].mean() if near.any() else slope.new_zeros(()) for slope, near in
         zip(-w_OI * gradient_OI, near_OI, strict=True)]
    )  # fmt: skip


def test_outputs_and_slopes_are_those_of_dense_masks() -> None:
    costs, threshold = random_costs(2, torch.float64), 0.1
    costs.root_O[4] = 100  # A row without a margin has no slope.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 40, generator=generator, dtype=torch.float64)
    bias_O = torch.randn(5, generator=generator, dtype=torch.float64)
    weights_BLO = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)

    dense_OI = costs.w_OI.where(all_costs(costs) > threshold, 0).requires_grad_()
    wanted_x = x.clone().requires_grad_()
    wanted = functional.linear(wanted_x, dense_OI, bias_O)
    (wanted * weights_BLO).sum().backward()
    assert dense_OI.grad is not None
    wanted_O = slopes(costs, threshold, costs.w_OI, dense_OI.grad)

    removed_O = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    found_x = x.clone().requires_grad_()
    found = thresholded_linear(found_x, costs, threshold, removed_O, bias_O)
    (found * weights_BLO).sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_x.grad, wanted_x.grad)
    torch.testing.assert_close(removed_O.grad, wanted_O)


def test_products_are_in_the_dtype_of_autocast() -> None:
    costs = random_costs(4, torch.float32)
    removed_O = torch.zeros(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = thresholded_linear(torch.randn(3, 40), costs, 0.1, removed_O, torch.ones(5))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert removed_O.grad is not None and removed_O.grad.dtype == torch.float32


def test_weights_that_have_moved_on_have_the_gradient_of_those_that_are_kept() -> None:
    costs, threshold = random_costs(2, torch.float64), 0.1
    costs.root_O[4] = 100
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 40, generator=generator, dtype=torch.float64)
    w_OI = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    bias_O = torch.randn(5, generator=generator, dtype=torch.float64)
    weights_BLO = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)

    kept_OI = all_costs(costs) > threshold
    masked_OI = (w_OI * kept_OI).requires_grad_()
    wanted_x = x.clone().requires_grad_()
    wanted_bias_O = bias_O.clone().requires_grad_()
    wanted = functional.linear(wanted_x, masked_OI, wanted_bias_O)
    (wanted * weights_BLO).sum().backward()
    assert masked_OI.grad is not None
    wanted_O = slopes(costs, threshold, w_OI, masked_OI.grad)

    # As a transposed module hands out its weight.
    parameter_IO = w_OI.T.clone().requires_grad_()
    removed_O = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    found_x, found_bias_O = x.clone().requires_grad_(), bias_O.clone().requires_grad_()
    found = trained_linear(found_x, parameter_IO.T, costs, threshold, removed_O, found_bias_O)
    (found * weights_BLO).sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_x.grad, wanted_x.grad)
    torch.testing.assert_close(found_bias_O.grad, wanted_bias_O.grad)
    assert parameter_IO.grad is not None
    torch.testing.assert_close(parameter_IO.grad.T, masked_OI.grad * kept_OI)
    torch.testing.assert_close(removed_O.grad, wanted_O)
