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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_is_the_weighted_sum_of_its_definition(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    total, parts = Loss(0.67, temperature)(student, NEXT, full(teacher, temperature))
    kl = functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    entropy = functional.cross_entropy(student, NEXT, reduction="sum")
    torch.testing.assert_close(total, 0.67 * temperature**2 * kl + 0.33 * entropy)
    torch.testing.assert_close(parts, torch.stack([entropy, kl]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [None, 4])
def test_equal_models_have_no_divergence_and_no_gradient(
    temperature: float, count: int | None
) -> None:
    student = logits(0).requires_grad_()
    target: Target = full(student.detach(), temperature)
    if count is not None:
        target = TopTarget.of_logits(student.detach().float(), temperature, count)
    total, _ = Loss(1.0, temperature)(student, NEXT, target)
    total.backward()
    assert float(total.detach()) == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-5


def test_size_of_the_gradient_does_not_depend_on_temperature() -> None:
    sizes = []
    for temperature in (1.0, 4.0):
        # Small logits: the limit in which T² is exact.
        student = logits(0, 0.01).requires_grad_()
        Loss(1.0, temperature)(student, NEXT, full(logits(1, 0.01), temperature))[0].backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    total, parts = Loss(0.0, 1.0)(logits(0), NEXT, None)
    torch.testing.assert_close(total, functional.cross_entropy(logits(0), NEXT, reduction="sum"))
    assert float(parts[1]) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_give_at_most_the_whole_divergence(temperature: float) -> None:
    student_PV = (logits(0) / temperature).log_softmax(-1)
    whole = full(logits(1), temperature).divergence(student_PV)
    before = torch.zeros(7)
    for count in (1, 3, 6, VOCABULARY - 1):
        part = TopTarget.of_logits(logits(1), temperature, count).divergence(student_PV)
        assert bool((part >= before - 1e-6).all())
        assert bool((part <= whole + 1e-6).all())
        before = part
    # With one token left over, the rest is that token.
    torch.testing.assert_close(before.double(), whole, rtol=1e-5, atol=1e-6)


def test_parts_give_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, VOCABULARY, bias=False).double()
    decoder = nn.Linear(3, 5).double()
    x_PD = torch.randn(7, 3, dtype=torch.float64)
    loss, target = Loss(0.5, 2.0), full(logits(1), 2.0)
    total, parts = loss(head(decoder(x_PD)), NEXT, target)
    (total / 7).backward()
    expected = [parameter.grad for parameter in (*head.parameters(), *decoder.parameters())]
    head.zero_grad()
    decoder.zero_grad()

    monkeypatch.setattr(distillation, "_LOGITS", 2 * VOCABULARY)
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
