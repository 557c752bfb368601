"""Reconstruct: gradient steps on the kept weights against the output of the whole block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.methods.block_task import BlockTask, Reference, relative_error
from secateur.methods.stage import BlockStage


class Reconstruct(BlockStage):
    """Train the kept weights of a block so that it returns what the dense block returned."""

    chooses_mask: ClassVar[bool] = False
    copies: ClassVar[int] = 4

    method: Literal["reconstruct"] = "reconstruct"
    epochs: int = Field(2, ge=1, description="passes over the fitted calibration windows")
    reference: Reference = Field("dense", description="as for the other block stages")
    learning_rate: float = Field(
        0.01,
        gt=0,
        description="of Adam, at its highest, as a share of each parameter's root mean square",
    )
    vectors: bool = Field(True, description="train norm gains and biases as well")

    def passes(self, sequences: int) -> float:
        return 3.0 * self.epochs

    def apply(self, task: BlockTask) -> None:
        weights = [linear.module.get_parameter("weight") for linear in task.linears]
        trained = list(weights)
        if self.vectors:
            trained += [p for p in task.block.parameters() if p.ndim == 1]
        masks = [
            (task.masks[linear.name].T if linear.transposed else task.masks[linear.name])
            for linear in task.linears
        ]
        kept = [(w, mask.to(w.device)) for w, mask in zip(weights, masks, strict=True)]
        task.accept_better(
            self.method, self.reference, trained, lambda: self._train(task, trained, kept)
        )

    def _train(
        self,
        task: BlockTask,
        trained: Sequence[nn.Parameter],
        kept: Sequence[tuple[nn.Parameter, Tensor]],
    ) -> None:
        batches = [
            batch for _ in range(self.epochs) for batch in task.fitted_batches(self.batch_sequences)
        ]
        # Adam's steps do not scale with a parameter, so the rate has to.
        groups = [
            {"params": [p], "lr": self.learning_rate * float(p.data.square().mean().sqrt())}
            for p in trained
        ]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: one_cycle(step, len(batches))
        )
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            for batch in batches:
                loss = relative_error(task.output(batch), task.target(batch, self.reference)).mean()
                loss.backward()
                for weight, mask in kept:
                    # Adam moves nothing whose gradient has always been zero: zeros stay exact.
                    if weight.grad is not None:
                        weight.grad.mul_(mask)
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
