"""Gradient steps on parts of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.solvers.schedule import warm_up_cosine


def relative_rate(parameter: Tensor, share: float) -> float:
    """A share of the parameter's root mean square: Adam's steps do not scale with it."""
    return share * float(parameter.data.square().mean().sqrt())


def descend(
    rates: Mapping[Tensor, float],
    batches: Sequence[Tensor],
    error: Callable[[Tensor], Tensor],
    *,
    prepare: Callable[[Tensor], None] | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Train by Adam, a step for each batch, at rates that follow ``one_cycle``.

    Args:
        rates: highest learning rates of leaf tensors, which want gradients only meanwhile.
        batches: what is handed to ``error``.
        error: returns a scalar with its graph.
        prepare: called with each tensor before its step, to change its gradient.
        finish: called after each backward pass.
    """
    with stepping(rates, prepare) as set_share:
        for step, batch in enumerate(batches):
            set_share(one_cycle(step, len(batches)))
            error(batch).backward()
            if finish is not None:
                finish()


@contextmanager
def stepping(
    rates: Mapping[Tensor, float], prepare: Callable[[Tensor], None] | None = None
) -> Iterator[Callable[[float], None]]:
    """Within the context a backward pass makes a step of Adam as well.

    Each tensor moves as soon as its gradient is known, and the gradient goes, so that there is
    never more than one of them.

    Yields:
        what sets the share of the highest learning rates that the next steps are made at.
    """
    optimisers = {
        parameter: torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.95), fused=True)
        for parameter, rate in rates.items()
    }

    def set_share(share: float) -> None:
        for parameter, optimiser in optimisers.items():
            optimiser.param_groups[0]["lr"] = rates[parameter] * share

    def step(parameter: Tensor) -> None:
        if prepare is not None:
            prepare(parameter)
        optimisers[parameter].step()
        parameter.grad = None

    hooks = []
    try:
        for parameter in rates:
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(step))
        yield set_share
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in rates:
            parameter.requires_grad_(False)
            parameter.grad = None


def one_cycle(step: int, steps: int) -> float:
    """Share of the highest learning rate: a tenth of the steps rise, a cosine ends at a tenth."""
    return warm_up_cosine(step, steps, rise=max(1, round(0.1 * steps)), fall=steps, floor=0.1)
