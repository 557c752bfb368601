"""ADMM: find mask and weights together."""

from __future__ import annotations

from typing import ClassVar, Literal

from secateur.methods.stage import Stage
from secateur.methods.task import GroupTask
from secateur.solvers.admm import admm
from secateur.walk.inputs import Needs


class ADMM(Stage):
    """Alternate between the best weights and the nearest weights with the pattern."""

    needs: ClassVar[Needs] = "gram"

    method: Literal["admm"] = "admm"

    def apply(self, task: GroupTask) -> None:
        task.take(admm(task.w_OI, task.gram_II, task.budget), "admm")
