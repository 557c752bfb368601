"""Gradient steps on parts of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def relative_rate(parameter: Tensor, share: float) -> float:
    """A share of the parameter's root mean square: Adam's steps do not scale with it."""
    return share * float(parameter.data.square().mean().sqrt())


def descend(
    rates: Iterable[tuple[Tensor, float]],
    batches: Sequence[Tensor],
    error: Callable[[Tensor], Tensor],
    finish_gradients: Callable[[], None] = lambda: None,
) -> None:
    """Train parameters by Adam, a step for each batch.

    Args:
        rates: leaf tensors, with the highest learning rate of each.
        batches: what is handed to ``error``.
        error: returns a scalar with its graph.
        finish_gradients: called before each step.
    """
    rates = list(rates)
    trained = [parameter for parameter, _ in rates]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in rates]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: one_cycle(step, len(batches))
    )
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        for batch in batches:
            error(batch).backward()
            finish_gradients()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None


def one_cycle(step: int, steps: int, warm_up: float = 0.1, last: float = 0.1) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to ``last``."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    fall = (step - rise) / max(1, steps - rise)
    return last + (1 - last) * (1 + math.cos(math.pi * fall)) / 2
