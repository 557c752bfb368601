"""ADMM: find mask and weights together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.blocks.tasks import GroupTask, Needs
from secateur.methods.stage import GroupStage
from secateur.solvers.admm import admm


class ADMM(GroupStage):
    """Search mask and weights together, then fit the weights on the mask found."""

    needs: ClassVar[Needs] = "gram"
    repeats: ClassVar[tuple[str, ...]] = ("iterations", "refit_iterations")

    method: Literal["admm"] = "admm"
    scope: Literal["linear", "row"] = Field(
        "row", description="where unstructured weights compete: in the whole linear or in a row"
    )
    damping: float = Field(
        0.01, gt=0, le=1e6, description="added to the Gram diagonal, share of its mean"
    )
    iterations: int = Field(12, ge=1, le=10_000, description="steps of the search for the mask")
    refit_iterations: int = Field(
        15, ge=1, le=10_000, description="most steps of the refit that follows"
    )

    def apply(self, task: GroupTask) -> None:
        row_zeros = None
        if task.mask_OI is not None:
            # A stage before has spread the zeros over the rows: search within each row.
            row_zeros = (~task.mask_OI).sum(1).tolist()
        solution = admm(
            task.dense_OI,
            task.gram_II,
            task.budget,
            scope=self.scope,
            row_zeros=row_zeros,
            damping=self.damping,
            iterations=self.iterations,
            refit_iterations=self.refit_iterations,
        )
        task.take(solution, "admm")
