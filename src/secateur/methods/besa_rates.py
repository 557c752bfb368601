"""BESA with rates instead of logits: a rate per row, set by what its marginal weight costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.architecture import Linear
from secateur.methods.block_task import BlockTask, relative_error
from secateur.methods.rows import take_best, uniform_masks, write_masks
from secateur.methods.stage import BlockStage
from secateur.pattern import lowest
from secateur.solvers.margin import follow_margin, margin_threshold
from secateur.walk.probes import RowSensitivity, random_projection


class BESARates(BlockStage):
    """Spread a block's zeros over its rows: closed form first, then straight-through steps."""

    needs_norms: ClassVar[bool] = True
    unstructured_only: ClassVar[bool] = True
    copies: ClassVar[int] = 4

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

    def _closed_form(self, task: BlockTask) -> dict[str, Tensor]:
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
                row_O1 = sensitivity.sums[name][:, None] / tokens
                costs[name] = dense_OI.square().mul_(square_I).mul_(row_O1)
        return costs

    def _follow(self, task: BlockTask, costs: dict[str, Tensor]) -> None:
        """Scale the costs of each row, step by step, by what the loss says at its margin."""
        weights = sum(cost.numel() for cost in costs.values())
        share = sum(task.zeros[name] for name in costs) / weights
        batches: list[Tensor] = []
        while len(batches) < self.steps:
            batches += task.fitted_batches(self.batch_sequences)
        for step, batch in enumerate(batches[: self.steps]):
            # The last masks are exact, those between steps need not be.
            threshold = margin_threshold(costs.values(), share)
            for linear in task.linears:
                if linear.name in costs:
                    kept_OI = costs[linear.name] > threshold
                    linear.weight_OI.copy_(task.dense[linear.name].where(kept_OI, 0))
            self._step(task, batch, costs, threshold, pull=self.rate * (1 - step / self.steps))

    def _step(
        self,
        task: BlockTask,
        batch: Tensor,
        costs: dict[str, Tensor],
        threshold: float,
        pull: float,
    ) -> None:
        def loss() -> Tensor:
            return relative_error(task.output(batch), task.target(batch, self.reference)).mean()

        def follow(linear: Linear, gradient_OI: Tensor) -> None:
            if linear.name in costs:
                slope_OI = gradient_OI.mul_(task.dense[linear.name]).neg_()
                follow_margin(costs[linear.name], slope_OI, threshold, pull)

        task.visit_gradients(loss, follow)


def _cheapest(task: BlockTask, costs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the cheapest weights of the block, exactly as many as the plan says."""
    zeros = sum(task.zeros[name] for name in costs)
    flat_1N = torch.cat([cost.flatten() for cost in costs.values()])[None]
    kept_N = ~lowest(flat_1N, [zeros])[0]
    parts = kept_N.split([cost.numel() for cost in costs.values()])
    masks = {name: part.view(costs[name].shape) for name, part in zip(costs, parts, strict=True)}
    return uniform_masks(task, leave_out=masks) | masks
