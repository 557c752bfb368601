"""Steps that are made within the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.methods.descent import descend, one_cycle, stepping

STEPS = 12


def problem() -> tuple[dict[Tensor, float], list[Tensor]]:
    """Two leaves with their learning rates, and batches."""
    generator = torch.Generator().manual_seed(3)
    first, second, *batches = (
        torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(2 + STEPS)
    )
    return {first: 0.1, second: 0.01}, batches


def error_of(leaves: list[Tensor], batch: Tensor) -> Tensor:
    hidden = (batch @ leaves[0]).tanh()
    return (hidden @ leaves[1] - batch).square().mean()


def test_it_is_adam_at_the_rates_of_one_cycle() -> None:
    rates, batches = problem()
    leaves = list(rates)
    plain = [leaf.clone().requires_grad_() for leaf in leaves]
    groups = [
        {"params": [leaf], "lr": rate} for leaf, rate in zip(plain, rates.values(), strict=True)
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, STEPS))
    for batch in batches:
        optimiser.zero_grad()
        error_of(plain, batch).backward()
        optimiser.step()
        schedule.step()

    descend(rates, batches, lambda batch: error_of(leaves, batch))
    for found, expected in zip(leaves, plain, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_there_is_one_gradient_at_a_time_and_none_afterwards() -> None:
    rates, batches = problem()
    leaves = list(rates)
    seen = []

    def prepare(parameter: Tensor) -> None:
        assert [leaf is parameter for leaf in leaves] == [leaf.grad is not None for leaf in leaves]
        seen.append(parameter)

    def finish() -> None:
        assert all(leaf.grad is None for leaf in leaves)

    descend(rates, batches, lambda batch: error_of(leaves, batch), prepare=prepare, finish=finish)
    assert len(seen) == 2 * STEPS
    assert not any(leaf.requires_grad for leaf in leaves)


def test_what_prepare_takes_from_a_gradient_does_not_move() -> None:
    rates, batches = problem()
    leaves = list(rates)
    kept = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    before = leaves[0].clone()

    def prepare(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(kept)

    descend(rates, batches, lambda batch: error_of(leaves, batch), prepare=prepare)
    assert torch.equal(leaves[0] == before, ~kept)


def test_rates_are_those_of_the_step_even_for_a_tensor_that_sat_out() -> None:
    """As an expert does in batches whose tokens it does not get."""
    rates, batches = problem()
    late, early = rates
    before = late.clone()
    done: list[Tensor] = []

    def finish() -> None:
        done.append(late.clone())

    descend(
        {late: 1.0, early: 1.0},
        batches,
        lambda _: (early if len(done) < STEPS - 1 else late).sum(),
        finish=finish,
    )
    assert all(torch.equal(each, before) for each in done[:-1])
    # The first step of Adam is as long as its learning rate, whatever the gradient.
    expected = torch.full_like(late, one_cycle(STEPS - 1, STEPS))
    torch.testing.assert_close(before - done[-1], expected, rtol=1e-6, atol=0)


def test_an_error_leaves_no_hooks_behind() -> None:
    leaf = torch.ones(2)
    with pytest.raises(ZeroDivisionError), stepping({leaf: 0.1}):
        raise ZeroDivisionError
    assert not leaf.requires_grad
    leaf.requires_grad_(True).sum().backward()
    assert torch.equal(leaf.detach(), torch.ones(2))
