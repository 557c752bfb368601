"""SparseGPT: choose columns from left to right and let the rest make up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from secateur.blocks.tasks import GroupTask, Needs
from secateur.methods.stage import GroupStage
from secateur.solvers.refit import refit
from secateur.solvers.sparsegpt import sparsegpt


class SparseGPT(GroupStage):
    """Remove weights column by column and correct the columns that follow."""

    needs: ClassVar[Needs] = "gram"

    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(
        0.01, gt=0, le=1e6, description="added to the Gram diagonal, share of its mean"
    )
    column_block: int = Field(
        128, ge=1, le=2**20, description="columns whose mask is chosen together"
    )
    refit_iterations: int = Field(
        10, ge=0, le=10_000, description="steps of refit on the mask found; 0 is the paper's method"
    )
    mask_only: bool = Field(
        False, description="take the mask alone: kept weights stay what they were, without refit"
    )

    def apply(self, task: GroupTask) -> None:
        solution = sparsegpt(
            task.w_OI,
            task.gram_II,
            task.budget,
            damping=self.damping,
            column_block=self.column_block,
        )
        if self.mask_only:
            solution = replace(solution, w_OI=task.w_OI.mul_(solution.mask_OI))
        elif self.refit_iterations:
            # The sweep corrects columns to the right only; those to the left can help as well.
            fitted_OI = refit(
                task.w_OI,
                solution.mask_OI,
                task.gram_II,
                damping=self.damping,
                iterations=self.refit_iterations,
                start_OI=solution.w_OI,
            )
            solution = replace(solution, w_OI=fitted_OI)
        task.take(solution, "sparsegpt")
