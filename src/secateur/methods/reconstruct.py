"""Reconstruct: gradient steps on the kept weights against the output of the whole block."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.methods.block_task import BlockTask, relative_error
from secateur.methods.stage import BlockStage


class Reconstruct(BlockStage):
    """Train the kept weights of a block so that it returns what the dense block returned."""

    chooses_mask: ClassVar[bool] = False

    method: Literal["reconstruct"] = "reconstruct"
    epochs: int = Field(2, ge=1, description="passes over the fitted calibration windows")
    learning_rate: float = Field(2e-4, gt=0, description="of Adam, at its highest")

    def apply(self, task: BlockTask) -> None:
        task.accept_better(self.method, self.reference, lambda: self._train(task))

    def _train(self, task: BlockTask) -> None:
        weights = {linear.name: linear.module.get_parameter("weight") for linear in task.linears}
        kept = {
            linear.name: task.masks[linear.name].T if linear.transposed else task.masks[linear.name]
            for linear in task.linears
        }
        kept = {name: mask.to(task.device) for name, mask in kept.items()}
        batches = [
            batch for _ in range(self.epochs) for batch in task.fitted_batches(self.batch_sequences)
        ]
        optimiser = torch.optim.Adam(
            weights.values(), lr=self.learning_rate, betas=(0.9, 0.95), fused=True
        )
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            for step, batch in enumerate(batches):
                for group in optimiser.param_groups:
                    group["lr"] = self.learning_rate * one_cycle(step, len(batches))
                loss = relative_error(task.output(batch), task.target(batch, self.reference)).mean()
                loss.backward()
                for name, weight in weights.items():
                    _mask_gradient(weight, kept[name])
                optimiser.step()
                optimiser.zero_grad()
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None


def _mask_gradient(weight: Tensor, mask: Tensor) -> None:
    # Adam moves nothing whose gradient has always been zero, so zeros stay exact.
    if weight.grad is not None:
        weight.grad.mul_(mask)


def one_cycle(step: int, steps: int, warm_up: float = 0.1, last: float = 0.1) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to ``last``."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    fall = (step - rise) / max(1, steps - rise)
    return last + (1 - last) * (1 + math.cos(math.pi * fall)) / 2
