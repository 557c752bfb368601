"""Refit: the best values for the weights that were kept."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.blocks.tasks import GroupTask, Needs
from secateur.methods.stage import GroupStage
from secateur.solvers.refit import refit


class Refit(GroupStage):
    """Solve masked least squares for the kept weights, all rows at once."""

    needs: ClassVar[Needs] = "gram"
    chooses_mask: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = True

    method: Literal["refit"] = "refit"
    damping: float = Field(0.01, gt=0, le=1e6, description="pull towards the dense weights")
    iterations: int = Field(20, ge=1, le=10_000, description="most conjugate-gradient steps")

    def apply(self, task: GroupTask) -> None:
        assert task.mask_OI is not None
        w_OI = refit(
            task.dense_OI,
            task.mask_OI,
            task.gram_II,
            damping=self.damping,
            iterations=self.iterations,
            start_OI=task.w_OI,
        )
        task.accept_better(w_OI, "refit")
