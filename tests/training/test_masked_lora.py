"""Low-rank changes that are masked: nothing at the start, nothing where weights were removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.models.structure import Linear
from secateur.patterns.pattern import Unstructured
from secateur.training.low_rank import MaskedLoRA
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import RowBudget


def masked(transposed: bool) -> MaskedLinear:
    torch.manual_seed(0)
    module = nn.Linear(5, 8, bias=False) if transposed else nn.Linear(8, 5, bias=False)
    module.requires_grad_(False)
    mask_OI = torch.rand(5, 8) > 0.4
    rows = RowBudget.of_mask(Unstructured(0.0), mask_OI)
    linear = Linear("w", module, transposed)
    linear.weight_OI.mul_(mask_OI)
    lora = MaskedLoRA.start((5, 8), 2, torch.Generator().manual_seed(1))
    return MaskedLinear("w", linear, rows, mask_OI, lora=lora)


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_it_computes_the_same_with_every_zero(transposed: bool) -> None:
    each = masked(transposed)
    assert each.lora is not None
    x_NI = torch.randn(3, 8)
    start_OI = each.in_rows(each.weight.data).clone()
    torch.testing.assert_close(each.forward(x_NI), x_NI @ start_OI.T)
    nn.init.normal_(each.lora.b_OR)
    trained = each.forward(x_NI)
    expected_OI = start_OI + each.lora.product() * each.mask_OI
    each.merge()
    merged_OI = each.in_rows(each.weight.data)
    torch.testing.assert_close(merged_OI, expected_OI)
    torch.testing.assert_close(x_NI @ merged_OI.T, trained)
    assert torch.equal(merged_OI != 0, each.mask_OI)
    torch.testing.assert_close(each.forward(x_NI), trained)


def test_gradients_are_those_of_kept_weights() -> None:
    each = masked(False)
    each.frozen = True
    assert each.lora is not None
    nn.init.normal_(each.lora.b_OR)
    x_NI = torch.randn(3, 8)
    each.forward(x_NI).square().sum().backward()
    a_RI, b_OR = each.lora.a_RI.detach(), each.lora.b_OR.detach().requires_grad_()
    (x_NI @ ((each.weight + b_OR @ a_RI) * each.mask_OI).T).square().sum().backward()
    torch.testing.assert_close(each.lora.b_OR.grad, b_OR.grad)
