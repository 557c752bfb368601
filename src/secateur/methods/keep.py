"""Keep: the masks that the checkpoint has."""

from __future__ import annotations

from typing import ClassVar, Literal

from secateur.blocks.tasks import GroupTask
from secateur.methods.stage import GroupStage
from secateur.patterns.pattern import Pattern, Unstructured


class Keep(GroupStage):
    """Take the masks beside the checkpoint, or else its zeros, and remove nothing more."""

    prunes_nothing: ClassVar[bool] = True
    works_blind: ClassVar[bool] = True

    method: Literal["keep"] = "keep"

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError for a pattern that asks for further zeros."""
        if pattern != Unstructured(0.0):
            raise ValueError(
                f"keep removes nothing more, and the pattern {pattern} asks for zeros; leave the "
                "pattern out, or choose a method that prunes"
            )

    def apply(self, task: GroupTask) -> None:
        if task.mask_OI is None:
            task.mask_OI = task.w_OI != 0
        task.w_OI.mul_(task.mask_OI)
