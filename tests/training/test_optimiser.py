"""The optimiser against scalar arithmetic, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.training.optimiser import MaskedAdamW
from secateur.training.options import DecayOptions, OptimiserOptions

BETAS, EPSILON = (0.9, 0.95), 1e-8
INSIDE, OUTSIDE = DecayOptions(place="inside"), DecayOptions(place="outside")
ABSOLUTE = DecayOptions(place="outside", norm="l1")


def optimiser(
    weight: torch.Tensor,
    mask: torch.Tensor,
    decay: DecayOptions = INSIDE,
    weight_decay: float = 0.0,
    second_moment: str = "update",
) -> tuple[nn.Parameter, MaskedAdamW]:
    parameter = nn.Parameter(weight.clone())
    values = {"weight_decay": weight_decay, "second_moment": second_moment}
    options = OptimiserOptions.model_validate(values)
    return parameter, MaskedAdamW({"w": parameter}, {"w": mask}, options, decay)


def rolled_out(
    w: float, kept: bool, gradients: list[float], second: str, *, rate: float, decay: float
) -> float:
    """Section 2.3 of the method, number by number."""
    m = v = 0.0
    for step, g in enumerate(gradients, start=1):
        w *= 1 - rate * 0.1
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        u = m + (0.0 if kept else decay * w)
        v = BETAS[1] * v + (1 - BETAS[1]) * (u * u if second == "update" else g * g)
        w -= rate / (1 - BETAS[0] ** step) * u / (math.sqrt(v / (1 - BETAS[1] ** step)) + EPSILON)
    return w


@pytest.mark.parametrize("second_moment", ["update", "gradient"])
def test_five_steps_match_scalar_arithmetic(second_moment: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4).double(), torch.randn(5, 3, 4).double()
    mask = torch.rand(3, 4) > 0.5
    weight, made = optimiser(start, mask, weight_decay=0.1, second_moment=second_moment)
    for gradient in gradients:
        weight.grad = gradient
        made.step(1e-2, decay=0.5)
    for row in range(3):
        for column in range(4):
            expected = rolled_out(
                float(start[row, column]),
                bool(mask[row, column]),
                gradients[:, row, column].tolist(),
                second_moment,
                rate=1e-2,
                decay=0.5,
            )
            assert float(weight.data[row, column]) == pytest.approx(expected, rel=1e-9)


def test_first_step_is_ten_times_that_of_adam() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    weight, made = optimiser(torch.zeros(2, 4), mask)
    weight.grad = torch.full((2, 4), 0.3)
    made.step(1e-3, decay=0.0)
    torch.testing.assert_close(weight.data, torch.full((2, 4), -1e-2))


@pytest.mark.parametrize("place", [INSIDE, OUTSIDE])
def test_without_decay_it_is_adamw(place: DecayOptions) -> None:
    torch.manual_seed(1)
    start, mask = torch.randn(300, 300), torch.rand(300, 300) > 0.5
    weight, made = optimiser(start, mask, place, weight_decay=0.1, second_moment="gradient")
    other = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([other], lr=1e-2, betas=BETAS, eps=EPSILON, weight_decay=0.1)
    for _ in range(5):
        weight.grad = torch.randn(300, 300)
        other.grad = weight.grad.clone()
        made.step(1e-2, decay=0.0)
        reference.step()
    torch.testing.assert_close(weight.data, other.data)


@pytest.mark.parametrize("place", [INSIDE, OUTSIDE])
def test_decay_shrinks_what_is_removed_and_nothing_else(place: DecayOptions) -> None:
    # The released code complements an integer mask bitwise, which makes kept weights grow.
    torch.manual_seed(2)
    start, mask = torch.randn(8, 16), torch.rand(8, 16) > 0.5
    weight, made = optimiser(start, mask, place)
    before = start
    for _ in range(5):
        weight.grad = torch.zeros(8, 16)
        made.step(1e-3, decay=0.1)
        assert torch.equal(weight.data[mask], start[mask])
        assert bool((weight.data.abs() < before.abs())[~mask].all())
        assert torch.equal(weight.data.sign(), start.sign())
        before = weight.data.clone()


def test_decay_outside_means_the_same_whatever_the_gradient() -> None:
    start, mask = torch.randn(4, 8), torch.rand(4, 8) > 0.5
    weight, made = optimiser(start, mask, OUTSIDE)
    plain, other = optimiser(start, mask, OUTSIDE)
    weight.grad = plain.grad = torch.randn(4, 8)
    made.step(1e-2, decay=5.0)
    other.step(1e-2, decay=0.0)
    torch.testing.assert_close(weight.data, plain.data * torch.where(mask, 1.0, 0.95))


@pytest.mark.parametrize("place", [INSIDE, OUTSIDE])
def test_removed_weights_that_are_forgotten_stay_zero(place: DecayOptions) -> None:
    torch.manual_seed(3)
    mask = torch.rand(8, 16) > 0.5
    weight, made = optimiser(torch.randn(8, 16), mask, place, weight_decay=0.1)
    for step in range(6):
        weight.grad = torch.randn(8, 16)
        if step == 3:
            weight.data.mul_(mask)
            made.forget_removed()
        if step >= 3:
            weight.grad.mul_(mask)
        made.step(1e-2, decay=0.1)
    assert torch.equal(weight != 0, mask)


def test_vectors_are_not_decayed() -> None:
    gain, matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
    made = MaskedAdamW(
        {"gain": gain, "matrix": matrix}, {}, OptimiserOptions(weight_decay=0.5), INSIDE
    )
    gain.grad, matrix.grad = torch.zeros(4), torch.zeros(4, 4)
    made.step(0.1, decay=0.0)
    assert torch.equal(gain.data, torch.ones(4))
    torch.testing.assert_close(matrix.data, torch.full((4, 4), 0.95))


def test_decay_by_absolute_value_is_in_adams_metric_and_stops_at_zero() -> None:
    torch.manual_seed(2)
    start = torch.randn(3, 4).double()
    mask = torch.tensor([[True, False, False, True]] * 3)
    decayed, made = optimiser(start, mask, ABSOLUTE, second_moment="gradient")
    plain, without = optimiser(start, mask, OUTSIDE, second_moment="gradient")
    gradient = torch.randn(3, 4).double()
    for weight, each in ((decayed, made), (plain, without)):
        weight.grad = gradient.clone()
        each.step(1e-2, decay=50.0 if each is made else 0.0)
    v = made.second["w"]
    lost = 1e-2 * 50.0 * (v.mean() / v).sqrt()
    expected = (plain.data.abs() - lost).clamp_min(0) * plain.data.sign()
    torch.testing.assert_close(decayed.data[~mask], expected[~mask])
    assert torch.equal(decayed.data[mask], plain.data[mask])
    assert bool((decayed.data[~mask] == 0).any())
    assert bool((decayed.data[~mask] != 0).any())


def test_decay_by_absolute_value_without_gradients_is_finite() -> None:
    mask = torch.tensor([[True, False]])
    weight, made = optimiser(torch.ones(1, 2), mask, ABSOLUTE)
    weight.grad = torch.zeros(1, 2)
    made.step(1e-2, decay=1.0)
    assert bool(weight.data.isfinite().all())
