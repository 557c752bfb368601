"""Clipping strengths that are learned while weights are on their grid."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.grids import Clipping, GridOptions, make_grid

# OmniQuant's: a strength of 0.982 to begin with.
_FIRST_LOGIT = 4.0


class LearnedClipping:
    """Two strengths for each group of a linear, the sigmoids of two logits.

    Attributes:
        logits: those of the lower and of the upper ends, (out, groups) each; they want gradients.
    """

    def __init__(self, w_OI: Tensor, options: GridOptions, stored: torch.dtype) -> None:
        self._options = options
        self._stored = stored
        shape = Clipping.none(w_OI, options).lower_OG
        self.logits = [torch.full_like(shape, _FIRST_LOGIT).requires_grad_() for _ in range(2)]

    @property
    def strengths(self) -> Clipping:
        """The strengths, with their graph where gradients are recorded."""
        lower, upper = self.logits
        return Clipping(lower.sigmoid(), upper.sigmoid())

    def on_grid(self, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
        """All weights, removed ones too, as values of the grid that the kept ones span."""
        grid = make_grid(w_OI, mask_OI, self._options, self.strengths, self._stored)
        return grid.nearest(w_OI)
