"""Permute: columns in an order that n:m can prune best."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.blocks.tasks import DenseTask
from secateur.methods.stage import DenseStage
from secateur.models.absorption import Absorption, find_absorptions
from secateur.patterns.pattern import NM, Pattern
from secateur.solvers.permutation import best_order
from secateur.solvers.scores import wanda_score


class Permute(DenseStage):
    """Reorder hidden channels so that large weights do not compete in one group of n:m."""

    method: Literal["permute"] = "permute"
    power: Literal[1, 2] = Field(
        1,
        description="of |weight| x input norm, whose kept sum is made large; 2 is the error of "
        "the output if inputs are not correlated",
    )

    def check_pattern(self, pattern: Pattern) -> None:
        if not isinstance(pattern, NM):
            raise ValueError(
                f"permute gives n:m other groups of columns, and the pattern {pattern} has none; "
                "leave it out, or choose n:m such as 2:4"
            )

    def apply(self, task: DenseTask) -> None:
        found = find_absorptions(task.block, task.groups, task.run)
        said = [self._reorder(task, absorption) for absorption in found]
        task.notes.append(f"permute: {'; '.join(said) or 'nothing that could be absorbed'}")

    def _reorder(self, task: DenseTask, absorption: Absorption) -> str:
        """Reorder what gains by it, and say what it gained."""
        assert isinstance(task.pattern, NM)
        reader = absorption.reader
        channels = absorption.columns_BSC.shape[2]
        if channels % task.pattern.m:
            return (
                f"{reader.name} left alone, {task.pattern.m} does not divide the {channels} "
                "channels of a head"
            )
        square_I = task.mean_squares[reader.name]
        score_OI = wanda_score(reader.weight_OI, square_I).pow_(self.power)
        found = best_order(absorption.split(score_OI), task.pattern, task.generator)
        absorption.reorder(found.order_BC)
        task.mean_squares[reader.name] = square_I[absorption.column_order(found.order_BC)]
        writers = ", ".join(writer.linear.name for writer in absorption.writers)
        return (
            f"{reader.name} with the rows of {writers} keeps {found.kept:.4f} of its score "
            f"instead of {found.kept_before:.4f}"
        )
