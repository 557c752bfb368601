"""Rates of rows and kept weights, learned in the same steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from secateur.blocks.tasks import BlockTask, Reference
from secateur.methods.descent import descend, relative_rate
from secateur.methods.rows import (
    cheapest_masks,
    removed_share,
    row_costs,
    slope_takers,
    take_best,
    thresholded,
    uniform_masks,
    write_masks,
)
from secateur.methods.stage import BlockStage
from secateur.models.structure import Linear
from secateur.solvers.besa import trained_linear
from secateur.solvers.margin import RowCosts, follow_margin, margin_threshold


class BESAReconstruct(BlockStage):
    """Train the weights of a block while its zeros find their rows: besa-rates and reconstruct."""

    needs_norms: ClassVar[bool] = True
    unstructured_only: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ("epochs",)

    method: Literal["besa-reconstruct"] = "besa-reconstruct"
    reference: Reference = Field("dense", description="as for the other block stages")
    batch_sequences: int = Field(1, ge=1, le=2**20, description="calibration windows in one step")
    probe_sequences: int = Field(
        8, ge=1, le=2**20, description="calibration windows that row sensitivities come from"
    )
    epochs: int = Field(
        1, ge=1, le=10_000, description="passes over the fitted calibration windows"
    )
    rate: float = Field(
        0.25, gt=0, le=1e3, description="how far the first step follows the marginal cost"
    )
    learning_rate: float = Field(
        0.015,
        gt=0,
        le=1e3,
        description="of Adam, at its highest, as a share of each parameter's root mean square",
    )

    def passes(self, sequences: int) -> float:
        return 3.0 * (self.probe_sequences / sequences + self.epochs)

    def apply(self, task: BlockTask) -> None:
        costs = row_costs(task, self.probe_sequences, self.batch_sequences)
        trained = [*task.weights, *task.vectors]
        untrained = {
            "uniform rates": uniform_masks(task),
            "row sensitivities": cheapest_masks(task, costs),
        }
        before = take_best(task, self.method, untrained)
        masks: dict[str, Tensor] = {}

        def train() -> None:
            write_masks(task, {})
            self._train(task, costs, trained)
            masks.update(cheapest_masks(task, costs))
            for linear in task.linears:
                linear.weight_OI.mul_(masks[linear.name])

        if task.accept_better(self.method, trained, train, before):
            task.masks.update({name: mask_OI.cpu() for name, mask_OI in masks.items()})

    def _train(
        self, task: BlockTask, costs: Mapping[str, RowCosts], trained: list[nn.Parameter]
    ) -> None:
        """Train dense weights, with the cheapest ones taken out, and scale costs by the slopes."""
        share = removed_share(task, costs)
        batches = task.training_batches(self.batch_sequences, self.epochs)
        removed = slope_takers(costs)
        thresholds: list[float] = []

        def forward(linear: Linear) -> Callable[[Tensor], Tensor]:
            return partial(
                trained_linear,
                w_OI=linear.parameter_OI,
                costs=costs[linear.name],
                threshold=thresholds[-1],
                removed_O=removed[linear.name],
                bias_O=linear.module._parameters.get("bias"),
            )

        def error(batch: Tensor) -> Tensor:
            thresholds.append(margin_threshold(costs.values(), share))
            with thresholded(task, costs, forward):
                return task.loss(batch)

        def follow() -> None:
            pull = self.rate * (1 - (len(thresholds) - 1) / len(batches))
            for name, slope_O in removed.items():
                if slope_O.grad is not None:
                    follow_margin(costs[name].root_O, slope_O.grad, thresholds[-1], pull)
                    slope_O.grad = None

        rates: dict[Tensor, float] = {p: relative_rate(p, self.learning_rate) for p in trained}
        descend(rates, batches, error, finish=follow)
