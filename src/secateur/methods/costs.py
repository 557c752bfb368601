"""What it costs a block to lose each of its weights, and the masks that take the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from secateur.blocks.block_task import BlockTask
from secateur.blocks.probes import RowSensitivity, random_projection
from secateur.methods.rows import uniform_masks, write_masks
from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear
from secateur.solvers.margin import RowCosts, cheapest


def closed_form(task: BlockTask, sequences: int, batch_sequences: int) -> dict[str, RowCosts]:
    """Expected rise of the loss for each weight removed, from probes of the dense block.

    Args:
        task: the block, which is left with its dense weights.
        sequences: calibration windows to probe with.
        batch_sequences: windows at a time.

    Returns:
        Costs by linear, without those that no token reached.
    """
    write_masks(task, {})
    sensitivity = RowSensitivity(task.linears)
    tokens = 0
    chosen = task.fitted_batches(batch_sequences)
    for batch in chosen[: -(-sequences // batch_sequences)]:

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


def removed_share(task: BlockTask, costs: Mapping[str, RowCosts]) -> float:
    """Share of the weights with costs that the plan removes."""
    weights = sum(each.w_OI.numel() for each in costs.values())
    return sum(task.zeros[name] for name in costs) / weights


def cheapest_masks(task: BlockTask, costs: Mapping[str, RowCosts]) -> dict[str, Tensor]:
    """Remove the cheapest weights of the block, exactly as many as the plan says."""
    found = cheapest(list(costs.values()), sum(task.zeros[name] for name in costs))
    masks = dict(zip(costs, found, strict=True))
    return uniform_masks(task, leave_out=masks) | masks


def slope_takers(costs: Mapping[str, RowCosts]) -> dict[str, Tensor]:
    """Leaves whose gradients are the slopes of the rows of each linear."""
    return {name: torch.zeros_like(each.root_O, requires_grad=True) for name, each in costs.items()}


def thresholded(
    task: BlockTask,
    costs: Mapping[str, RowCosts],
    forward: Callable[[Linear], Callable[[Tensor], Tensor]],
) -> AbstractContextManager[None]:
    """Within the context linears that have costs run by the forward that is given for each."""
    return replaced_forwards(
        (linear.module, forward(linear)) for linear in task.linears if linear.name in costs
    )
