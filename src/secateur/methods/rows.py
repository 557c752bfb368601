"""Masks that differ in how a block's zeros are spread over its rows."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from secateur.blocks.block_task import BlockTask, Reference
from secateur.patterns.pattern import Budget, select
from secateur.solvers.grids import Clipping, make_grid
from secateur.solvers.quantise import round_to_grid
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
    """Give the block its dense weights, less what the masks remove; no mask, nothing removed."""
    for linear in task.linears:
        dense_OI = task.dense[linear.name]
        mask_OI = masks.get(linear.name)
        linear.weight_OI.copy_(dense_OI if mask_OI is None else dense_OI * mask_OI)


def write_rounded(
    task: BlockTask, masks: Mapping[str, Tensor], clippings: Mapping[str, Clipping]
) -> None:
    """Give the block its dense weights on the recipe's grid, less what the masks remove."""
    assert task.grid is not None
    for linear in task.linears:
        dense_OI, mask_OI = task.dense[linear.name], masks[linear.name].to(task.device)
        clipping = clippings.get(linear.name)
        grid = make_grid(dense_OI, mask_OI, task.grid, clipping, task.stored)
        linear.weight_OI.copy_(round_to_grid(dense_OI, mask_OI, grid).w_OI)


def take_best(
    task: BlockTask,
    stage: str,
    reference: Reference,
    candidates: Mapping[str, Mapping[str, Tensor]],
    clippings: Mapping[str, Mapping[str, Clipping]] | None = None,
) -> float:
    """Prune the block with the masks whose held-out error is lowest, and note all errors.

    Args:
        task: the block.
        stage: name of the stage, for the note.
        reference: what the error is measured against.
        candidates: masks by a description of where they come from; of equal ones the first wins.
        clippings: of the candidates that have them, by description; given, errors are those of
            weights on the recipe's grid, which the weights that are left are not on yet.

    Returns:
        that error.
    """
    errors = {}
    for name, masks in candidates.items():
        if clippings is None:
            write_masks(task, masks)
        else:
            write_rounded(task, masks, clippings.get(name, {}))
        task.round_weights()
        errors[name] = task.held_out_error(reference)
    chosen = min(errors, key=errors.__getitem__)
    best = candidates[chosen]
    write_masks(task, best)
    task.round_weights()
    if clippings is not None:
        task.clippings.update(clippings.get(chosen, {}))
    task.masks.update({name: mask_OI.cpu() for name, mask_OI in best.items()})
    listed = ", ".join(f"{error:.4g} with {name}" for name, error in errors.items())
    task.notes.append(f"{stage}: held-out error {listed}")
    return errors[chosen]
