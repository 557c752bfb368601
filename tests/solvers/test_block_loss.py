"""The loss of a block's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.solvers.block_loss import inverse_square_norms, relative_loss


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return reference + 0.1 * noise, reference


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


def test_norms_may_come_from_more_tokens() -> None:
    output, reference = outputs()
    both = inverse_square_norms(reference)
    parts = [relative_loss(output[i], reference[i], both) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], relative_loss(output, reference))
