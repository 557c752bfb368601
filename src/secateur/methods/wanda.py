"""Wanda: weight magnitude times the norm of its input."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.blocks.tasks import GroupTask, Needs
from secateur.methods.stage import GroupStage
from secateur.patterns.pattern import NM, Pattern, select
from secateur.solvers.scores import wanda_score


class Wanda(GroupStage):
    """Remove the weights with the smallest |weight| x input norm."""

    needs: ClassVar[Needs] = "norms"

    method: Literal["wanda"] = "wanda"
    scope: Literal["linear", "row"] = Field(
        "row", description="where unstructured weights compete: in the whole linear or in a row"
    )

    def wants_dense_inputs(self, pattern: Pattern) -> bool:
        """Under n:m, as in the released code.

        Inputs that pruned linears distort mislead a choice that nothing makes up for.
        """
        return isinstance(pattern, NM)

    def apply(self, task: GroupTask) -> None:
        score_OI = wanda_score(task.w_OI, task.statistics.mean_square_I)
        task.mask_OI = select(score_OI, task.budget, self.scope)
        task.w_OI.mul_(task.mask_OI)
