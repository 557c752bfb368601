"""How far hidden states are from the dense model's."""

from __future__ import annotations

import torch

from secateur.solvers.block_loss import relative_error
from secateur.training.block_fitting import bounded_error


def test_a_token_that_is_huge_in_one_model_alone_does_not_outweigh_the_others() -> None:
    target_BLD = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    y_BLD = 0.9 * target_BLD
    torch.testing.assert_close(bounded_error(y_BLD, target_BLD), relative_error(y_BLD, target_BLD))
    y_BLD[0, 3] *= -1e4
    error_BL = bounded_error(y_BLD, target_BLD)
    assert relative_error(y_BLD, target_BLD)[0, 3] > 1e7
    assert 1 < float(error_BL[0, 3]) < 1.01
    assert bool((bounded_error(-target_BLD, target_BLD) <= 4 + 1e-5).all())


def test_the_larger_square_is_no_way_out() -> None:
    target_BLD = torch.ones(1, 1, 4)
    y_BLD = torch.full((1, 1, 4), 3.0, requires_grad=True)
    bounded_error(y_BLD, target_BLD).sum().backward()
    assert y_BLD.grad is not None
    # A step against the gradient leads back to the target, not further away from zero.
    assert bool((y_BLD.grad > 0).all())
