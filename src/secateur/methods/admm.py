"""ADMM: find mask and weights together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.methods.stage import GroupStage
from secateur.methods.task import GroupTask
from secateur.solvers.admm import admm
from secateur.walk.inputs import Needs


class ADMM(GroupStage):
    """Search mask and weights together, then fit the weights on the mask found."""

    needs: ClassVar[Needs] = "gram"

    method: Literal["admm"] = "admm"
    scope: Literal["linear", "row"] = Field(
        "row", description="where unstructured weights compete: in the whole linear or in a row"
    )
    damping: float = Field(0.01, gt=0, description="added to the Gram diagonal, share of its mean")
    iterations: int = Field(12, ge=1, description="steps of the search for the mask")
    refit_iterations: int = Field(15, ge=1, description="most steps of the refit that follows")

    def apply(self, task: GroupTask) -> None:
        solution = admm(
            task.w_OI,
            task.gram_II,
            task.budget,
            scope=self.scope,
            damping=self.damping,
            iterations=self.iterations,
            refit_iterations=self.refit_iterations,
        )
        task.take(solution, "admm")
