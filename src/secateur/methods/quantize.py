"""Quantize: kept weights on a grid of a few bits, removed ones exactly zero."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field

from secateur.blocks.tasks import GroupTask, Needs
from secateur.methods.stage import GroupStage
from secateur.models.experts import unstacked_experts
from secateur.models.formats import FormatName
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import (
    GridOptions,
    QuantizedSolution,
    make_grid,
    round_to_grid,
    search_clipping,
)
from secateur.solvers.quantize import quantize


class Quantize(GroupStage):
    """Give each kept weight one of a few values, such that outputs change little."""

    needs: ClassVar[Needs] = "gram"
    chooses_mask: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = True
    comes_last: ClassVar[bool] = True
    works_blind: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ("rounds",)

    method: Literal["quantize"] = "quantize"
    bits: Literal[3, 4, 8] = Field(4, description="bits of the integer that stands for a weight")
    group: int = Field(
        128,
        ge=0,
        le=2**20,
        description="columns of a row that share a scale; 0 for one scale per row",
    )
    symmetric: bool = Field(True, description="without zero points")
    solver: Literal["feedback", "round"] = Field(
        "feedback",
        description="feedback lets kept weights make up for each other's errors, then refits the "
        "scales; round takes the nearest value of the whole range",
    )
    damping: float = Field(
        0.01, gt=0, le=1e6, description="added to the Gram diagonal, share of its mean"
    )
    rounds: int = Field(
        2, ge=0, le=10_000, description="refits of the scales, each with a pass over weights"
    )
    format: FormatName = Field(
        "packed",
        description="packed is compressed-tensors' pack-quantized; dequantized saves the grid's "
        "values in the checkpoint's own dtype",
    )

    def scaled(self, divisor: int) -> Self:
        stage = super().scaled(divisor)
        return stage.model_copy(update={"group": -(-self.group // divisor)})

    @property
    def grid(self) -> GridOptions:
        """What the grids look like."""
        return GridOptions(self.bits, self.group, self.symmetric)

    def check_widths(self, blocks: BlockList) -> None:
        """Raise SecateurError if the groups do not divide the columns of a linear."""
        widths: dict[int, str] = {}
        for index, block in enumerate(blocks):
            with unstacked_experts(block):
                for linear in blocks.linears(index):
                    name = f"{blocks.name(index)}.{linear.name}"
                    widths.setdefault(linear.weight_OI.shape[1], name)
        for width, name in widths.items():
            if self.group and width % self.group:
                common = math.gcd(*widths)
                fitting = max(n for n in range(1, self.group) if common % n == 0)
                raise SecateurError(
                    f"Groups of {self.group} columns do not divide the {width} columns of {name}; "
                    f"use --quantize-group {fitting}, or 0 for one scale per row."
                )

    def apply(self, task: GroupTask) -> None:
        assert task.mask_OI is not None
        w_OI, mask_OI, stored = task.w_OI, task.mask_OI, task.stored
        clipping = task.clipping
        if clipping is None and self.solver == "feedback" and not task.blind:
            square_I = task.statistics.mean_square_I
            clipping = search_clipping(w_OI, mask_OI, square_I, self.grid, stored)
        grid = make_grid(w_OI, mask_OI, self.grid, clipping, stored)
        solution = rounded = round_to_grid(w_OI, mask_OI, grid)
        if self.solver == "feedback" and not task.blind:
            solution = quantize(
                w_OI,
                mask_OI,
                task.gram_II,
                grid,
                damping=self.damping,
                rounds=self.rounds,
                stored=stored,
            )
        _take_better(task, solution, rounded)


def _take_better(task: GroupTask, solution: QuantizedSolution, rounded: QuantizedSolution) -> None:
    """Take the solution, or the rounded one for linears whose held-out outputs it moves less."""
    found = task.held_out_errors(solution.w_OI, task.w_OI)
    plain = task.held_out_errors(rounded.w_OI, task.w_OI)
    for name, rows, new, old in zip(task.names, task.row_slices(), found, plain, strict=True):
        if new > old:
            solution = solution.rows_from(rounded, rows)
            task.notes.append(
                f"{name}: rounded without feedback, which would move held-out outputs by "
                f"{new:.4g} instead of {old:.4g}"
            )
    joined = ", ".join(task.names)
    task.notes += [f"{joined}: quantize {note}" for note in solution.notes]
    task.w_OI, task.quantized = solution.w_OI, solution
