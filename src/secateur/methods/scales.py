"""Scales: gradient steps on the scales of quantised weights against the output of the block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from secateur.blocks.tasks import BlockTask, Reference
from secateur.methods.descent import descend, relative_rate
from secateur.methods.stage import BlockStage
from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear
from secateur.solvers.grids import QuantizedSolution, representable


class Scales(BlockStage):
    """Train the scales of quantised weights so that the block returns what the dense one did.

    Integers stay what they are, so zeros do, and the file has the size that it had.
    """

    chooses_mask: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = True
    comes_last: ClassVar[bool] = True
    follows: ClassVar[str | None] = "quantize"
    repeats: ClassVar[tuple[str, ...]] = ("epochs",)

    method: Literal["scales"] = "scales"
    epochs: int = Field(
        1, ge=1, le=10_000, description="passes over the fitted calibration windows"
    )
    reference: Reference = Field("dense", description="as for the other block stages")
    learning_rate: float = Field(
        0.005,
        gt=0,
        le=1e3,
        description="of Adam, at its highest, as a share of each scale, and of the root mean "
        "square of other parameters",
    )
    vectors: bool = Field(True, description="train norm gains and biases as well")

    def passes(self, sequences: int) -> float:
        return 3.0 * self.epochs

    def apply(self, task: BlockTask) -> None:
        assert task.quantization is not None
        solutions = task.quantization.solutions
        levels = [_Levels.of(linear, solutions[linear.name]) for linear in task.linears]
        vectors = task.vectors if self.vectors else []
        batches = task.training_batches(self.batch_sequences, self.epochs)

        def train() -> None:
            rates = {each.exponent_OG: self.learning_rate for each in levels}
            rates |= {p: relative_rate(p, self.learning_rate) for p in vectors}
            with replaced_forwards((each.linear.module, each.forward) for each in levels):
                descend(rates, batches, task.loss)
            for each in levels:
                each.linear.weight_OI.copy_(each.solution(task.stored).w_OI)

        if task.accept_better(self.method, [*task.weights, *vectors], train):
            solutions.update({each.linear.name: each.solution(task.stored) for each in levels})


@dataclass(frozen=True)
class _Levels:
    """A linear on its grid, whose scales are to be multiplied by exp(exponent).

    Attributes:
        linear: the linear.
        found: its weights as the quantiser left them.
        level_OGI: their integers, in one byte where these fit, else two.
        exponent_OG: what is trained, 0 at first.
    """

    linear: Linear
    found: QuantizedSolution
    level_OGI: Tensor
    exponent_OG: Tensor

    @classmethod
    def of(cls, linear: Linear, found: QuantizedSolution) -> _Levels:
        # Levels of an asymmetric grid of 8 bits reach from -255 to 255.
        dtype = torch.int16 if found.grid.options.bits == 8 else torch.int8
        scale_OG = found.grid.scale_OG
        level_OGI = found.level_OI.to(dtype).unflatten(1, (scale_OG.shape[1], -1))
        return cls(linear, found, level_OGI, torch.zeros_like(scale_OG))

    def forward(self, x: Tensor) -> Tensor:
        """The linear by weights computed anew, with a graph behind its scales."""
        scale_OG = self.found.grid.scale_OG * self.exponent_OG.exp()
        w_OI = (self.level_OGI * scale_OG.unsqueeze(2)).flatten(1)
        return functional.linear(x, w_OI, self.linear.bias_O)

    def solution(self, stored: torch.dtype) -> QuantizedSolution:
        """The weights as they are now."""
        grid = self.found.grid
        scale_OG = representable(grid.scale_OG * self.exponent_OG.exp(), stored)
        return replace(self.found, grid=grid.with_scales(scale_OG))
