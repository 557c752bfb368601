"""LLM-Barber: exchange badly chosen weights by the gradients of attention's or the MLP's error."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, field_validator
from torch import Tensor

from secateur.blocks.passes import (
    LinearPass,
    Part,
    catch_call,
    find_parts,
    output_gradients,
    recorded_passes,
    weight_gradient,
)
from secateur.blocks.tasks import BlockTask
from secateur.methods.rebuild import Rebuild, kept_values
from secateur.methods.stage import BlockStage
from secateur.patterns.pattern import NM, Pattern, Scope
from secateur.solvers.barber import barber_score, rebuild_masks


class Barber(BlockStage):
    """Exchange removed and kept weights by |weight| x gradient of the error of their part."""

    chooses_mask: ClassVar[bool] = False

    method: Literal["barber"] = "barber"
    scope: Scope = Field(
        "row",
        validation_alias=AliasChoices("scope", "granularity"),
        description="where weights are exchanged: in an output row, an input column, a linear, or "
        "block, the linears of attention, or of the MLP, together",
    )
    ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the pairs in wrong order to exchange, in [0, 1]; 0.01 as released",
    )
    windows: int = Field(
        32, ge=1, le=2**20, description="most calibration windows that gradients are taken from"
    )

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError for exchanges that would leave the groups of n:m."""
        if isinstance(pattern, NM) and self.scope != "row":
            raise ValueError(
                f"under the pattern {pattern} barber exchanges weights within groups of a row, "
                f"not within a {self.scope}; use scope: row"
            )

    @field_validator("ratio", mode="before")
    @classmethod
    def _ratio_is_named(cls, ratio: Any) -> Any:
        # It chose by the block's error, which falls where perplexity rises.
        if ratio == "best":
            raise ValueError("best is gone; name a number, 0.01 as released or 1 for all pairs")
        return ratio

    def step_size(self, sequences: int) -> int:
        return min(super().step_size(sequences), self.windows)

    def passes(self, sequences: int) -> float:
        # Each part is run as it is, dense, and backwards; attention once more on the way to the
        # MLP. Then comes the held-out third, before and after the offer to each of two parts.
        looked_at = min(self.windows / max(sequences, 1), 1)
        return 4.5 * looked_at + 1

    def apply(self, task: BlockTask) -> None:
        rebuild = Rebuild(task, self.method)
        for part in find_parts(task.block, task.linears):
            squares = self._squared_gradients(task, part)
            names = [linear.name for linear in part.linears]
            masks = [task.masks[name].to(task.device) for name in names]
            scores = [
                barber_score(kept_values(task, each.name, each.weight_OI), squares.pop(each.name))
                for each in part.linears
            ]
            rebuilt = rebuild_masks(scores, masks, task.pattern, self.scope, self.ratio)
            rebuild.offer(part, {f"ratio {self.ratio:g}": dict(zip(names, rebuilt, strict=True))})
        rebuild.note()

    def _squared_gradients(self, task: BlockTask, part: Part) -> dict[str, Tensor]:
        """Squared gradients of each sequence's error, mean over sequences; (out, in) by name.

        The error is that of the part's output against the dense part's, both on what the pruned
        block hands it; the gradient is taken at the dense weights.
        """
        squares = {
            linear.name: torch.zeros_like(task.dense[linear.name]) for linear in part.linears
        }
        batches = task.fitted_batches(self.batch_sequences, self.windows)
        for batch in batches:
            passes, error_B = _dense_pass(task, part, batch)
            in_order = all(len(each.x_NI) == len(batch) * task.length for each in passes)
            if in_order:
                for each, gradient_NO in output_gradients(error_B.sum(), passes):
                    _add_squares(squares, each, gradient_NO, len(batch))
                continue
            # Experts get tokens of many sequences, which only a pass for each tells apart.
            for error in error_B:
                for each, gradient_NO in output_gradients(error, passes, keep_graph=True):
                    _add_squares(squares, each, gradient_NO, 1)
        count = sum(len(batch) for batch in batches)
        return {name: square_OI.div_(count) for name, square_OI in squares.items()}


def _dense_pass(task: BlockTask, part: Part, batch: Tensor) -> tuple[list[LinearPass], Tensor]:
    """Run a part as it is and dense; the calls of the dense one, and its error by sequence."""
    with torch.no_grad(), task.stream.precision():
        call = catch_call(part, lambda: task.output(batch))
        pruned = call.output()
    with task.stream.precision(), recorded_passes(part.linears) as passes:
        dense = call.output_with(task.dense)
    return passes, (dense - pruned).square().reshape(len(batch), -1).mean(1)


def _add_squares(
    squares: dict[str, Tensor], each: LinearPass, gradient_NO: Tensor, sequences: int
) -> None:
    tokens = len(gradient_NO) // sequences
    for gradient_TO, x_TI in zip(gradient_NO.split(tokens), each.x_NI.split(tokens), strict=True):
        gradient_OI = weight_gradient(gradient_TO, x_TI)
        squares[each.linear.name].addcmul_(gradient_OI, gradient_OI)
