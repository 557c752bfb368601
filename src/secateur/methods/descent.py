"""Gradient steps on parts of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def relative_rate(parameter: Tensor, share: float) -> float:
    """A share of the parameter's root mean square: Adam's steps do not scale with it."""
    return share * float(parameter.data.square().mean().sqrt())


def adam(rates: Iterable[tuple[Tensor, float]], steps: int) -> torch.optim.Optimizer:
    """Adam for so many steps, whose learning rates rise and fall by ``one_cycle``.

    Args:
        rates: leaf tensors, with the highest learning rate of each.
        steps: after which the rates are at their end.
    """
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in rates]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, steps))
    optimiser.register_step_post_hook(lambda *_: schedule.step())
    return optimiser


def descend(
    optimisers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Tensor],
    error: Callable[[Tensor], Tensor],
    finish_gradients: Callable[[], None] = lambda: None,
) -> None:
    """Train what the optimisers hold, a step for each batch.

    Args:
        optimisers: of leaf tensors, which want gradients only meanwhile.
        batches: what is handed to ``error``.
        error: returns a scalar with its graph.
        finish_gradients: called before each step.
    """
    trained = [
        parameter
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        for batch in batches:
            error(batch).backward()
            finish_gradients()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
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
