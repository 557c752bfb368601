"""Masks that spread a block's zeros over its rows, and the choice of the best of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from secateur.blocks.passes import RowSensitivity, random_projection
from secateur.blocks.tasks import BlockTask
from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear
from secateur.patterns.pattern import Budget, select
from secateur.solvers.grids import Clipping, make_grid, round_to_grid
from secateur.solvers.margin import RowCosts, cheapest
from secateur.solvers.scores import wanda_score


def block_scores(task: BlockTask, name: str) -> Tensor:
    """Wanda scores of a linear, or magnitudes where no token arrived; (out, in)."""
    square_I = task.mean_squares[name]
    return wanda_score(task.dense[name], square_I if square_I.any() else 1 + square_I)


def uniform_masks(task: BlockTask, leave_out: Container[str] = ()) -> dict[str, Tensor]:
    """Wanda's masks: the same rate in every row of a linear."""
    masks = {}
    for name, dense_OI in task.dense.items():
        if name not in leave_out:
            budget = Budget(task.pattern, (len(dense_OI),), (task.zeros[name],))
            masks[name] = select(block_scores(task, name), budget, "row")
    return masks


def write_masks(task: BlockTask, masks: Mapping[str, Tensor]) -> None:
    """Give the block its dense weights, masked where there is a mask."""
    for linear in task.linears:
        dense_OI = task.dense[linear.name]
        mask_OI = masks.get(linear.name)
        linear.weight_OI.copy_(dense_OI if mask_OI is None else dense_OI * mask_OI)


def write_rounded(
    task: BlockTask, masks: Mapping[str, Tensor], clippings: Mapping[str, Clipping]
) -> None:
    """Give the block its dense weights, masked and on the recipe's grid."""
    assert task.quantization is not None
    for linear in task.linears:
        dense_OI, mask_OI = task.dense[linear.name], masks[linear.name].to(task.device)
        clipping = clippings.get(linear.name)
        grid = make_grid(dense_OI, mask_OI, task.quantization.grid, clipping, task.stored)
        linear.weight_OI.copy_(round_to_grid(dense_OI, mask_OI, grid).w_OI)


def take_best(
    task: BlockTask,
    stage: str,
    candidates: Mapping[str, Mapping[str, Tensor]],
    clippings: Mapping[str, Mapping[str, Clipping]] | None = None,
) -> float:
    """Prune the block with the masks of lowest held-out error, which is returned.

    Args:
        task: the block.
        stage: name of the stage, for the note of all errors.
        candidates: masks by a description of their origin; of equal ones the first wins.
        clippings: of the candidates that have them, by description. If given, errors are those of
            weights on the recipe's grid; the weights that are left are not on it yet.
    """
    errors = {}
    for name, masks in candidates.items():
        if clippings is None:
            write_masks(task, masks)
        else:
            write_rounded(task, masks, clippings.get(name, {}))
        task.round_weights()
        errors[name] = task.held_out_error()
    chosen = min(errors, key=errors.__getitem__)
    write_masks(task, candidates[chosen])
    task.round_weights()
    if clippings is not None and task.quantization is not None:
        task.quantization.clippings.update(clippings.get(chosen, {}))
    task.masks.update({name: mask_OI.cpu() for name, mask_OI in candidates[chosen].items()})
    listed = ", ".join(f"{error:.4g} with {name}" for name, error in errors.items())
    task.notes.append(f"{stage}: held-out error {listed}")
    return errors[chosen]


def row_costs(task: BlockTask, sequences: int, batch_sequences: int) -> dict[str, RowCosts]:
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
        # Without tokens every weight would seem to cost nothing, and the linear would be emptied.
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
