"""BESA with rates instead of logits: a rate per row, set by what its marginal weight costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from secateur.blocks.tasks import BlockTask
from secateur.methods.rows import (
    cheapest_masks,
    removed_share,
    row_costs,
    slope_takers,
    take_best,
    thresholded,
    uniform_masks,
)
from secateur.methods.stage import BlockStage
from secateur.models.structure import Linear
from secateur.solvers.besa import thresholded_linear
from secateur.solvers.margin import RowCosts, follow_margin, margin_threshold


class BESARates(BlockStage):
    """Spread a block's zeros over its rows: closed form first, then straight-through steps."""

    needs_norms: ClassVar[bool] = True
    unstructured_only: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ("steps",)

    method: Literal["besa-rates"] = "besa-rates"
    probe_sequences: int = Field(
        16, ge=1, le=2**20, description="calibration windows that row sensitivities come from"
    )
    steps: int = Field(
        24, ge=0, le=100_000, description="straight-through steps; 0 leaves the closed form"
    )
    rate: float = Field(0.5, gt=0, le=1e3, description="how far a step follows the marginal cost")

    def passes(self, sequences: int) -> float:
        return 3.0 * (self.probe_sequences + self.steps * self.batch_sequences) / sequences

    def apply(self, task: BlockTask) -> None:
        candidates = {"uniform rates": uniform_masks(task)}
        costs = row_costs(task, self.probe_sequences, self.batch_sequences)
        candidates["row sensitivities"] = cheapest_masks(task, costs)
        if self.steps:
            self._follow(task, costs)
            candidates["straight-through steps"] = cheapest_masks(task, costs)
        take_best(task, self.method, candidates)

    def _follow(self, task: BlockTask, costs: Mapping[str, RowCosts]) -> None:
        """Scale the costs of each row, step by step, by what the loss says at its margin."""
        share = removed_share(task, costs)
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
        removed = slope_takers(costs)

        def forward(linear: Linear) -> Callable[[Tensor], Tensor]:
            return partial(
                thresholded_linear,
                costs=costs[linear.name],
                threshold=threshold,
                removed_O=removed[linear.name],
                bias_O=linear.bias_O,
            )

        with thresholded(task, costs, forward):
            task.loss(batch).backward()
        return {name: each.grad for name, each in removed.items() if each.grad is not None}
