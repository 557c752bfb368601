"""The loss against its definition, whole and in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.training import distillation
from secateur.training.distillation import FullTarget, Loss, Target, TopTarget, backward_in_parts

VOCABULARY = 11


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, VOCABULARY, generator=generator, dtype=torch.float64)


def full(z_PV: torch.Tensor, temperature: float) -> FullTarget:
    return FullTarget((z_PV / temperature).log_softmax(-1))


NEXT = torch.arange(7) % VOCABULARY


def divergence(target: Target, student_PV: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) at each position, or that of a few tokens and the rest."""
    if isinstance(target, FullTarget):
        teacher_PV = target.teacher_PV
    else:
        assert isinstance(target, TopTarget)
        rest_P = student_PV.scatter(1, target.token_PK, -torch.inf).logsumexp(1)
        student_PV = torch.cat([student_PV.gather(1, target.token_PK), rest_P[:, None]], 1)
        teacher_PV = torch.cat([target.teacher_PK, target.rest_P[:, None]], 1)
    return functional.kl_div(
        student_PV, teacher_PV.to(student_PV), reduction="none", log_target=True
    ).sum(1)


def compared(target: Target, student_PV: torch.Tensor) -> torch.Tensor:
    """What the target says of a student with these log-probabilities."""
    return target.compare(student_PV, torch.zeros(len(student_PV)), student_PV.exp())


def definition(
    student: torch.Tensor, target: Target | None, weight: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts and gradient of the loss as its formula says, differentiated automatically."""
    student = student.clone().requires_grad_()
    entropy = functional.cross_entropy(student, NEXT, reduction="sum")
    kl = torch.zeros_like(entropy)
    if target is not None:
        kl = divergence(target, (student / temperature).log_softmax(-1)).sum()
    (weight * temperature**2 * kl + (1 - weight) * entropy).backward()
    assert student.grad is not None
    return torch.stack([entropy, kl]).detach(), student.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.67, 1.0])
@pytest.mark.parametrize("count", [None, 1, 4, VOCABULARY - 1])
# With large logits some positions leave next to nothing for the rest, and others do not.
@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_gradient_is_that_of_the_definition(
    temperature: float, weight: float, count: int | None, scale: float
) -> None:
    target: Target = full(logits(1), temperature)
    if count is not None:
        target = TopTarget.of_logits(logits(1, scale), temperature, count)
    expected = definition(logits(0, scale), target, weight, temperature)
    found = Loss(weight, temperature).gradient(logits(0, scale), NEXT, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [None, 4])
def test_equal_models_have_no_divergence_and_no_gradient(
    temperature: float, count: int | None
) -> None:
    target: Target = full(logits(0), temperature)
    if count is not None:
        target = TopTarget.of_logits(logits(0).float(), temperature, count)
    parts, gradient_PV = Loss(1.0, temperature).gradient(logits(0), NEXT, target)
    assert float(parts[1]) == pytest.approx(0, abs=1e-5)
    assert float(gradient_PV.abs().max()) < 1e-5


def test_size_of_the_gradient_does_not_depend_on_temperature() -> None:
    # Small logits: the limit in which T² is exact.
    sizes = [
        float(
            Loss(1.0, temperature)
            .gradient(logits(0, 0.01), NEXT, full(logits(1, 0.01), temperature))[1]
            .norm()
        )
        for temperature in (1.0, 4.0)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    found = Loss(0.67, 2.0).gradient(logits(0), NEXT, None)
    torch.testing.assert_close(found, definition(logits(0), None, 0.0, 1.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_give_at_most_the_whole_divergence(temperature: float) -> None:
    student_PV = (logits(0) / temperature).log_softmax(-1)
    whole = compared(full(logits(1), temperature), student_PV)
    before = torch.zeros(7)
    for count in (1, 3, 6, VOCABULARY - 1):
        part = compared(TopTarget.of_logits(logits(1), temperature, count), student_PV)
        assert bool((part >= before - 1e-6).all())
        assert bool((part <= whole + 1e-6).all())
        before = part
    # With one token left over, the rest is that token.
    torch.testing.assert_close(before.double(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [1, 100])
def test_parts_give_the_gradients_of_the_whole(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, VOCABULARY, bias=False).double()
    decoder = nn.Linear(3, 5).double()
    x_PD = torch.randn(7, 3, dtype=torch.float64)
    loss, target = Loss(0.5, 2.0), full(logits(1), 2.0)
    whole_PV = head(decoder(x_PD))
    parts, gradient_PV = definition(whole_PV.detach(), target, 0.5, 2.0)
    whole_PV.backward(gradient_PV / 7)
    expected = [parameter.grad for parameter in (*head.parameters(), *decoder.parameters())]
    head.zero_grad()
    decoder.zero_grad()

    monkeypatch.setattr(distillation, "_LOGITS", 2 * VOCABULARY)
    monkeypatch.setattr(distillation, "_CACHED", cached * VOCABULARY)
    slices = []

    def at(part: slice) -> Target:
        slices.append(part)
        return FullTarget(target.teacher_PV[part])

    sums = backward_in_parts(
        decoder(x_PD), NEXT, head, at, loss, vocabulary=VOCABULARY, scale=1 / 7
    )
    assert len(slices) == 4
    torch.testing.assert_close(sums.double(), parts, rtol=1e-5, atol=0)
    found = [parameter.grad for parameter in (*head.parameters(), *decoder.parameters())]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_student_that_rules_out_the_rest_has_a_finite_gradient() -> None:
    target = TopTarget.of_logits(torch.zeros(1, 4), 1.0, 2)
    student = torch.full((1, 4), -200.0)
    student[0, target.token_PK[0]] = 0.0
    parts, gradient_PV = Loss(1.0, 1.0).gradient(student, torch.tensor([0]), target)
    assert bool(gradient_PV.isfinite().all())
    assert float(parts[1]) == pytest.approx(0.5 * 200, rel=0.01)
