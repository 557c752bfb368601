"""Masks that differ in how a block's zeros are spread over its rows."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from secateur.methods.block_task import BlockTask, Reference
from secateur.pattern import Budget, select
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


def take_best(
    task: BlockTask,
    stage: str,
    reference: Reference,
    candidates: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Prune the block with the masks whose held-out error is lowest, and note all errors.

    Args:
        task: the block.
        stage: name of the stage, for the note.
        reference: what the error is measured against.
        candidates: masks by a description of where they come from; of equal ones the first wins.
    """
    errors = {}
    for name, masks in candidates.items():
        write_masks(task, masks)
        task.round_weights()
        errors[name] = task.held_out_error(reference)
    best = candidates[min(errors, key=errors.__getitem__)]
    write_masks(task, best)
    task.round_weights()
    task.masks.update({name: mask_OI.cpu() for name, mask_OI in best.items()})
    listed = ", ".join(f"{error:.4g} with {name}" for name, error in errors.items())
    task.notes.append(f"{stage}: held-out error {listed}")
