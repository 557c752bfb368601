"""Masked linears: what they compute, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.models.structure import Linear
from secateur.patterns.pattern import NM
from secateur.training.low_rank import SLoRB
from secateur.training.masked_linear import MaskedLinear, masked_forward, masked_weight
from secateur.training.masks import RowBudget, choose_mask


def make(transposed: bool, low_rank: bool = False) -> tuple[nn.Module, MaskedLinear]:
    torch.manual_seed(0)
    module: nn.Module = Conv1D(5, 8) if transposed else nn.Linear(8, 5)
    module.double()
    linear = Linear("proj", module, transposed)
    nn.init.normal_(linear.module.get_parameter("weight"))
    rows = RowBudget.even(NM(2, 4), 5, 20)
    mask_OI = choose_mask(linear.weight_OI.abs(), rows)
    boost = None
    if low_rank:
        boost = SLoRB(linear.weight_OI * ~mask_OI, 4, train_projection=True).double()
    return module, MaskedLinear("block.proj", linear, rows, mask_OI, boost)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
def test_output_is_that_of_the_masked_weight(transposed: bool, low_rank: bool) -> None:
    module, masked = make(transposed, low_rank)
    x_NI = torch.randn(3, 8, dtype=torch.float64)
    weight_OI = masked.linear.weight_OI * masked.mask_OI
    if masked.low_rank is not None:
        weight_OI = weight_OI + masked.low_rank.s_OR.data @ masked.low_rank.x_RI.data
    plain = module(x_NI)
    with masked_forward([masked]):
        torch.testing.assert_close(module(x_NI), x_NI @ weight_OI.T + module.bias)
        masked.weight.data[~masked.mask] = 100.0
        torch.testing.assert_close(module(x_NI), x_NI @ weight_OI.T + module.bias)
        masked.weight.data[~masked.mask] = 0.0
    assert not torch.equal(module(x_NI), plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_weight_gets_the_gradient_of_the_masked_one(transposed: bool, frozen: bool) -> None:
    module, masked = make(transposed)
    masked.frozen = frozen
    x_NI = torch.randn(3, 8, dtype=torch.float64)
    effective_OI = (masked.linear.weight_OI * masked.mask_OI).requires_grad_()
    (x_NI @ effective_OI.T + module.bias.detach()).square().sum().backward()
    assert effective_OI.grad is not None
    with masked_forward([masked]):
        module(x_NI).square().sum().backward()
    assert masked.weight.grad is not None
    expected_OI = effective_OI.grad * masked.mask_OI if frozen else effective_OI.grad
    torch.testing.assert_close(
        masked.weight.grad.T if transposed else masked.weight.grad, expected_OI
    )


def test_products_have_the_dtype_of_autocast_and_gradients_that_of_the_weight() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    mask = torch.rand(4, 8) > 0.5
    masked = masked_weight(weight, mask, torch.bfloat16)
    assert masked.dtype == torch.bfloat16
    assert torch.equal(masked != 0, mask)
    masked.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    module = nn.Linear(8, 4)
    each = MaskedLinear(
        "proj", Linear("proj", module, False), RowBudget.even(NM(2, 4), 4, 16), mask
    )
    with masked_forward([each]), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 8)).dtype == torch.bfloat16


def test_no_pass_changes_a_mask() -> None:
    module, masked = make(False)
    before = masked.mask.clone()
    with masked_forward([masked]):
        for _ in range(3):
            module(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    assert torch.equal(masked.mask, before)
