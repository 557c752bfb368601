"""Reconstruct: gradient steps on the kept weights against the output of the whole block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.blocks.passes import Part, catch_call, find_parts
from secateur.blocks.tasks import BlockTask, Reference
from secateur.methods.descent import descend, relative_rate
from secateur.methods.stage import BlockStage
from secateur.solvers.block_loss import relative_error


class Reconstruct(BlockStage):
    """Train the kept weights of a block so that it returns what the dense block returned."""

    chooses_mask: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ("epochs",)

    method: Literal["reconstruct"] = "reconstruct"
    epochs: int = Field(
        2, ge=1, le=10_000, description="passes over the fitted calibration windows"
    )
    reference: Reference = Field("dense", description="as for the other block stages")
    learning_rate: float = Field(
        0.01,
        gt=0,
        le=1e3,
        description="of Adam, at its highest, as a share of each parameter's root mean square",
    )
    window: Literal["block", "parts"] = Field(
        "block",
        description="what is trained at a time: the block, or its parts (attention, MLP) one after "
        "the other, each against its dense self",
    )
    vectors: bool = Field(True, description="train norm gains and biases as well")

    def passes(self, sequences: int) -> float:
        return (3.0 if self.window == "block" else 5.0) * self.epochs

    def apply(self, task: BlockTask) -> None:
        kept: dict[Tensor, Tensor] = {}
        for linear, weight in zip(task.linears, task.weights, strict=True):
            mask_OI = task.masks[linear.name].to(task.device)
            kept[weight] = mask_OI.T if linear.transposed else mask_OI
        trained = [*kept, *(task.vectors if self.vectors else ())]

        def train() -> None:
            if self.window == "block":
                self._train(task, trained, kept, task.loss)
                return
            for part in find_parts(task.block, task.linears):
                inside = set(part.module.parameters())
                own = [parameter for parameter in trained if parameter in inside]
                self._train(task, own, kept, partial(_part_error, task, part))

        task.accept_better(self.method, trained, train)

    def _train(
        self,
        task: BlockTask,
        trained: Sequence[Tensor],
        kept: Mapping[Tensor, Tensor],
        error: Callable[[Tensor], Tensor],
    ) -> None:
        batches = task.training_batches(self.batch_sequences, self.epochs)

        def keep_zeros(parameter: Tensor) -> None:
            # Adam moves nothing whose gradient has always been zero: zeros stay exact.
            if parameter.grad is not None and parameter in kept:
                parameter.grad.mul_(kept[parameter])

        rates: dict[Tensor, float] = {p: relative_rate(p, self.learning_rate) for p in trained}
        descend(rates, batches, error, prepare=keep_zeros)


def _part_error(task: BlockTask, part: Part, batch: Tensor) -> Tensor:
    """Relative error of a part against its dense self, on what the pruned block hands it."""
    with torch.no_grad(), task.stream.precision():
        call = catch_call(part, lambda: task.output(batch))
        target = call.output_with(task.dense)
    with task.stream.precision():
        return relative_error(call.output(), target).mean()
