"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.blocks.tasks import GroupTask
from secateur.methods.stage import GroupStage
from secateur.patterns.pattern import select
from secateur.solvers.scores import magnitude_score


class Magnitude(GroupStage):
    """Remove the weights of smallest absolute value; no calibration text is used."""

    method: Literal["magnitude"] = "magnitude"
    scope: Literal["linear", "row"] = Field(
        "linear", description="where unstructured weights compete: in the whole linear or in a row"
    )

    def apply(self, task: GroupTask) -> None:
        task.mask_OI = select(magnitude_score(task.w_OI), task.budget, self.scope)
        task.w_OI.mul_(task.mask_OI)
