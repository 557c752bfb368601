"""Row sensitivities against the Jacobian."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from secateur.blocks.passes import RowSensitivity, random_signs
from secateur.models.structure import find_linears


def test_mean_over_all_signs_is_the_diagonal_of_the_squared_jacobian() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x_ND = torch.randn(2, 3, dtype=torch.float64)
    linears = find_linears(block)
    sensitivity = RowSensitivity(linears)
    signs = list(itertools.product([-1.0, 1.0], repeat=4))
    for row in signs:
        # One sign per output feature is enough here: tokens do not mix in this block.
        v_D = torch.tensor(row, dtype=torch.float64)
        sensitivity.add(lambda v_D=v_D: (block(x_ND.requires_grad_()) * v_D).sum())

    hidden_NI = block[0](x_ND).detach()
    expected_O = sum(
        torch.autograd.functional.jacobian(lambda h: block[2](torch.tanh(h)), h_I).square().sum(0)
        for h_I in hidden_NI
    )
    found_O = sensitivity.sums["0"].double() / len(signs)
    torch.testing.assert_close(found_O, expected_O, rtol=1e-5, atol=0)
    torch.testing.assert_close(sensitivity.sums["2"] / len(signs), torch.full((4,), 2.0))


def test_random_signs_are_signs_and_repeat_with_the_seed() -> None:
    like = torch.zeros(50, 40)
    first, second = (random_signs(like, torch.Generator().manual_seed(seed)) for seed in (3, 3))
    assert torch.equal(first, second)
    assert torch.equal(first.abs(), torch.ones_like(first))
    assert abs(float(first.mean())) < 0.1
