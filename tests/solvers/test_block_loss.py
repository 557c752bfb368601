"""The loss of a block's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.solvers.block_loss import relative_error, relative_loss, state_error


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return reference + 0.1 * noise, reference


def test_relative_error_is_taken_token_by_token() -> None:
    target_BLD = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    error_BL = relative_error(target_BLD * 1.1, target_BLD)
    torch.testing.assert_close(error_BL, torch.full((1, 2), 0.01))


def test_a_hidden_state_is_held_to_its_direction_and_a_tenth_to_its_length() -> None:
    y_BLD, target_BLD = outputs()
    length_BL, wanted_BL = y_BLD.norm(dim=-1), target_BLD.norm(dim=-1)
    cosine_BL = torch.cosine_similarity(y_BLD, target_BLD, dim=-1)
    expected_BL = 2 * (1 - cosine_BL) + 0.1 * (length_BL / wanted_BL - 1) ** 2
    torch.testing.assert_close(state_error(y_BLD, target_BLD), expected_BL)
    torch.testing.assert_close(
        state_error(1.1 * target_BLD, target_BLD), torch.full_like(expected_BL, 0.001)
    )
    assert bool((state_error(target_BLD, target_BLD) == 0).all())


def test_a_small_error_of_a_hidden_state_keeps_its_digits() -> None:
    _, target_BLD = outputs()
    y_BLD = (target_BLD + 1e-3 * outputs(seed=1)[0]).float()
    exact_BL = state_error(y_BLD.double(), target_BLD.float().double())
    found_BL = state_error(y_BLD, target_BLD.float())
    torch.testing.assert_close(found_BL.double(), exact_BL, rtol=2e-3, atol=0)


@pytest.mark.parametrize("nothing", ["output", "reference"])
def test_a_hidden_state_of_zeros_leaves_error_and_gradient_finite(nothing: str) -> None:
    output, reference = (values.float() for values in outputs())
    (output if nothing == "output" else reference)[0, 0] = 0
    output.requires_grad_()
    error_BL = state_error(output, reference)
    assert bool(error_BL.isfinite().all())
    if nothing == "output":
        assert error_BL[0, 0].item() == pytest.approx(1.1)
    error_BL.sum().backward()
    assert output.grad is not None and bool(output.grad.isfinite().all())


def test_it_is_the_mean_over_features_of_relative_squared_errors() -> None:
    output, reference = outputs()
    expected = 0.0
    for feature in range(3):
        difference = (output - reference)[..., feature]
        expected += float((difference.norm() / reference[..., feature].norm()) ** 2) / 3
    assert float(relative_loss(output, reference)) == pytest.approx(expected, rel=1e-12)


def test_equal_outputs_lose_nothing() -> None:
    _, reference = outputs()
    assert float(relative_loss(reference, reference)) == 0


def test_the_scale_of_a_feature_does_not_matter() -> None:
    output, reference = outputs()
    scale_H = torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(
        relative_loss(output * scale_H, reference * scale_H), relative_loss(output, reference)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_that_is_zero_leaves_loss_and_gradient_finite(dtype: torch.dtype) -> None:
    output, reference = (values.to(dtype) for values in outputs())
    reference[..., 1] = 0
    output.requires_grad_()
    loss = relative_loss(output, reference)
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert output.grad is not None and bool(output.grad.isfinite().all())
    assert float(output.grad[..., 1].abs().max()) == 0
