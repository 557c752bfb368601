"""What a method works on: linears that share their input, stacked row on row."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from secateur.blocks.inputs import InputStatistics
from secateur.patterns.pattern import Budget
from secateur.solvers.grids import Clipping, QuantisedSolution
from secateur.solvers.solution import SparseSolution


@dataclass
class GroupTask:
    """The linears of one group and all that is known about their input.

    Attributes:
        names: names of the linears inside the block, in stacking order.
        dense_OI: their original weights, rows stacked, fp32; methods must not write into it.
        w_OI: their weights as the stages so far left them.
        mask_OI: True = kept; None until a stage has chosen a mask.
        budget: what the mask must look like.
        statistics: of the inputs, over the fitted calibration tokens.
        held_out_NI: inputs of tokens that nothing was fitted on, in the dtype of forward passes.
        stored: dtype that weights are saved in.
        clipping: how much of the range of kept weights grids are to cover, if that was learned.
        quantised: the weights as levels of a grid; None until a stage has quantised them.
        notes: sentences for the report: fallbacks used, updates rejected.
    """

    names: tuple[str, ...]
    dense_OI: Tensor
    w_OI: Tensor
    budget: Budget
    statistics: InputStatistics
    held_out_NI: Tensor
    mask_OI: Tensor | None = None
    stored: torch.dtype = torch.float32
    clipping: Clipping | None = None
    quantised: QuantisedSolution | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def gram_II(self) -> Tensor:
        """The Gram matrix of the inputs; stages that use it declare that they need it."""
        assert self.statistics.gram_II is not None
        return self.statistics.gram_II

    @property
    def blind(self) -> bool:
        """No calibration token reached these linears."""
        return self.statistics.tokens == 0

    def row_slices(self) -> list[slice]:
        """Where each linear's rows are in the stack."""
        ends = torch.tensor(self.budget.rows).cumsum(0).tolist()
        return [slice(end - rows, end) for rows, end in zip(self.budget.rows, ends, strict=True)]

    def held_out_errors(self, w_OI: Tensor, reference_OI: Tensor | None = None) -> list[float]:
        """Squared output error of each linear on held-out tokens, if it had ``w_OI``.

        Relative to the power of the dense output, and against that output unless other reference
        weights are given.
        """
        if len(self.held_out_NI) == 0:
            return [float("nan")] * len(self.names)
        error_O = self._held_out_power(
            w_OI - (self.dense_OI if reference_OI is None else reference_OI)
        )
        tiny = torch.finfo(torch.float32).tiny
        return [
            (error_O[rows].sum() / self._dense_power_O[rows].sum().clamp_min(tiny)).item()
            for rows in self.row_slices()
        ]

    @cached_property
    def _dense_power_O(self) -> Tensor:
        return self._held_out_power(self.dense_OI)

    def _held_out_power(self, w_OI: Tensor) -> Tensor:
        x_NI = self.held_out_NI
        return (x_NI @ w_OI.to(x_NI.dtype).T).float().square().sum(0)

    def take(self, solution: SparseSolution, stage: str) -> None:
        """Take the mask and weights of a solver, and what it had to fall back to."""
        self.mask_OI, self.w_OI = solution.mask_OI, solution.w_OI
        self.notes += [f"{', '.join(self.names)}: {stage} {note}" for note in solution.notes]

    def accept_better(self, w_OI: Tensor, stage: str) -> None:
        """Take new weights linear by linear, where the held-out error does not rise."""
        before = self.held_out_errors(self.w_OI)
        after = self.held_out_errors(w_OI)
        for name, rows, old, new in zip(self.names, self.row_slices(), before, after, strict=True):
            if new <= old:
                self.w_OI[rows] = w_OI[rows]
            else:
                self.notes.append(
                    f"{name}: {stage} rejected, held-out error would rise from {old:.4g} "
                    f"to {new:.4g}"
                )
