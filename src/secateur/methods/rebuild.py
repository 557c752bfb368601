"""Other masks for the parts of a block, taken only where held-out text agrees."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.blocks.passes import Part
from secateur.blocks.tasks import BlockTask


class Rebuild:
    """Tries masks part by part and takes those that do not raise the block's held-out error.

    Args:
        task: the block, with masks.
        stage: name of the stage, for the note.
    """

    def __init__(self, task: BlockTask, stage: str) -> None:
        self._task = task
        self._stage = stage
        self._first = self._error = task.held_out_error()
        self._outcomes: list[str] = []

    def offer(self, part: Part, candidates: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Try masks of a part, take the best if the error does not rise, else change nothing.

        Kept weights stay as they are; restored ones come back with their dense value.

        Args:
            part: the part.
            candidates: masks of its linears by name, by a description of their origin; of equal
                ones the first wins.
        """
        before = {linear.name: linear.weight_OI.clone() for linear in part.linears}
        errors = {}
        for description, masks in candidates.items():
            self._write(part, before, masks)
            errors[description] = self._task.held_out_error()
        best = min(errors, key=errors.__getitem__)
        masks = candidates[best]
        pairs = sum(
            int((self._task.masks[name] & ~mask_OI.cpu()).sum()) for name, mask_OI in masks.items()
        )
        name = part.linears[0].name.partition(".")[0]
        if errors[best] <= self._error:
            self._write(part, before, masks)
            self._task.masks.update({name: mask_OI.cpu() for name, mask_OI in masks.items()})
            self._error = errors[best]
            self._outcomes.append(f"{pairs} pairs exchanged in {name} ({best})")
        else:
            for linear in part.linears:
                linear.weight_OI.copy_(before[linear.name])
            self._outcomes.append(
                f"none in {name}, where the best offer ({pairs}, {best}) would raise the error to "
                f"{errors[best]:.4g}"
            )

    def note(self) -> None:
        """Note what was exchanged, and the held-out error before and after."""
        self._task.notes.append(
            f"{self._stage}: {'; '.join(self._outcomes)}; held-out error from {self._first:.4g} "
            f"to {self._error:.4g}"
        )

    def _write(self, part: Part, before: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        for linear in part.linears:
            value_OI = kept_values(self._task, linear.name, before[linear.name])
            linear.weight_OI.copy_(value_OI.masked_fill_(~masks[linear.name], 0))
        self._task.round_weights()


def kept_values(task: BlockTask, name: str, w_OI: Tensor) -> Tensor:
    """What each weight is if it is kept: ``w_OI`` under the mask, else its dense value."""
    return w_OI.where(task.masks[name].to(w_OI.device), task.dense[name])
