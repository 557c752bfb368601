"""BESA with rates instead of logits: a rate per row, set by what its marginal weight costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.architecture import Linear
from secateur.architecture.forwards import replaced_forwards
from secateur.methods.block_task import BlockTask
from secateur.methods.rows import take_best, uniform_masks, write_masks
from secateur.methods.stage import BlockStage
from secateur.solvers.margin import (
    RowCosts,
    cheapest,
    follow_margin,
    margin_threshold,
    thresholded_linear,
)
from secateur.walk.probes import RowSensitivity, random_projection


class BESARates(BlockStage):
    """Spread a block's zeros over its rows: closed form first, then straight-through steps."""

    needs_norms: ClassVar[bool] = True
    unstructured_only: ClassVar[bool] = True
    copies: ClassVar[int] = 1

    method: Literal["besa-rates"] = "besa-rates"
    probe_sequences: int = Field(
        16, ge=1, description="calibration windows that row sensitivities come from"
    )
    steps: int = Field(24, ge=0, description="straight-through steps; 0 leaves the closed form")
    rate: float = Field(0.5, gt=0, description="how far a step follows the marginal cost")

    def passes(self, sequences: int) -> float:
        return 3.0 * (self.probe_sequences + self.steps * self.batch_sequences) / sequences

    def apply(self, task: BlockTask) -> None:
        candidates = {"uniform rates": uniform_masks(task)}
        costs = self._closed_form(task)
        candidates["row sensitivities"] = _cheapest(task, costs)
        if self.steps:
            self._follow(task, costs)
            candidates["straight-through steps"] = _cheapest(task, costs)
        take_best(task, self.method, self.reference, candidates)

    def _closed_form(self, task: BlockTask) -> dict[str, RowCosts]:
        """Expected rise of the loss for each weight removed, from probes of the dense block."""
        write_masks(task, {})
        sensitivity = RowSensitivity(task.linears)
        tokens = 0
        chosen = task.fitted_batches(self.batch_sequences)
        for batch in chosen[: -(-self.probe_sequences // self.batch_sequences)]:

            def probe(batch: Tensor = batch) -> Tensor:
                return random_projection(task.output(batch, with_graph=True), task.generator)

            sensitivity.add(probe)
            tokens += len(batch) * task.length
        costs = {}
        for name, dense_OI in task.dense.items():
            square_I = task.mean_squares[name]
            # A linear that no token reached costs nothing, which is no reason to empty it.
            if square_I.any():
                root_O = (sensitivity.sums[name] / tokens).sqrt_()
                costs[name] = RowCosts(dense_OI, square_I.sqrt(), root_O)
        return costs

    def _follow(self, task: BlockTask, costs: Mapping[str, RowCosts]) -> None:
        """Scale the costs of each row, step by step, by what the loss says at its margin."""
        weights = sum(each.w_OI.numel() for each in costs.values())
        share = sum(task.zeros[name] for name in costs) / weights
        batches: list[Tensor] = []
        while len(batches) < self.steps:
            batches += task.fitted_batches(self.batch_sequences)
        for step, batch in enumerate(batches[: self.steps]):
            # The last masks are exact, those between steps need not be.
            threshold = margin_threshold(costs.values(), share)
            slopes = self._slopes(task, batch, costs, threshold)
            for name, slope_O in slopes.items():
                pull = self.rate * (1 - step / self.steps)
                follow_margin(costs[name].root_O, slope_O, threshold, pull)

    def _slopes(
        self, task: BlockTask, batch: Tensor, costs: Mapping[str, RowCosts], threshold: float
    ) -> dict[str, Tensor]:
        """The loss's slope at the margin of each row, for linears that the batch reached."""
        removed = {
            name: torch.zeros_like(each.root_O, requires_grad=True) for name, each in costs.items()
        }

        def thresholded(linear: Linear) -> Callable[[Tensor], Tensor]:
            return partial(
                thresholded_linear,
                costs=costs[linear.name],
                threshold=threshold,
                removed_O=removed[linear.name],
                bias_O=linear.bias_O,
            )

        with replaced_forwards(
            (linear.module, thresholded(linear)) for linear in task.linears if linear.name in costs
        ):
            task.output_error(batch, self.reference).mean().backward()
        return {name: each.grad for name, each in removed.items() if each.grad is not None}


def _cheapest(task: BlockTask, costs: Mapping[str, RowCosts]) -> dict[str, Tensor]:
    """Remove the cheapest weights of the block, exactly as many as the plan says."""
    found = cheapest(list(costs.values()), sum(task.zeros[name] for name in costs))
    masks = dict(zip(costs, found, strict=True))
    return uniform_masks(task, leave_out=masks) | masks
