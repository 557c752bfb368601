"""SparseGPT: choose columns from left to right and let the rest make up for them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.methods.stage import Stage
from secateur.methods.task import GroupTask
from secateur.solvers.sparsegpt import sparsegpt
from secateur.walk.inputs import Needs


class SparseGPT(Stage):
    """Remove weights column by column and correct the columns that follow."""

    needs: ClassVar[Needs] = "gram"

    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description="added to the Gram diagonal, share of its mean")
    column_block: int = Field(128, ge=1, description="columns whose mask is chosen together")

    def apply(self, task: GroupTask) -> None:
        solution = sparsegpt(
            task.w_OI,
            task.gram_II,
            task.budget,
            damping=self.damping,
            column_block=self.column_block,
        )
        task.take(solution, "sparsegpt")
