"""Grids of a few bits on which removed weights are exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from secateur.runs.errors import SecateurError

# Shares of the full range that are tried for each group.
_SHARES = tuple(1 - step / 20 for step in range(11))


@dataclass(frozen=True)
class GridOptions:
    """What grids look like.

    Attributes:
        bits: A weight takes one of 2^bits values.
        group: Consecutive columns of a row that share a scale; 0 is the whole row.
        symmetric: The integer 0 stands for zero; else each group has a zero point.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        """Smallest stored integer."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1

    def columns(self, width: int) -> int:
        """Columns in a group of a row of this width.

        Raises:
            SecateurError: Groups do not divide the row.
        """
        if self.group and width % self.group:
            raise SecateurError(
                f"groups of {self.group} columns do not divide a width of {width}; choose a "
                "divisor, or 0 for one scale per row"
            )
        return self.group or width


@dataclass(frozen=True)
class Grid:
    """Values (stored − zero) · scale that the weights of each group may take.

    Attributes:
        options: Bits, group and symmetry.
        scale_OG: Step of each group, positive, representable in the dtype it is saved in.
        zero_OG: Integer that stands for zero, as floating point; 0 if symmetric.
    """

    options: GridOptions
    scale_OG: Tensor
    zero_OG: Tensor

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return replace(self, scale_OG=self.scale_OG[rows], zero_OG=self.zero_OG[rows])

    def with_scales(self, scale_OG: Tensor) -> Grid:
        """The grid with other steps."""
        return replace(self, scale_OG=scale_OG)

    def scales(self, width: int) -> Tensor:
        """scale_OI: the step of each weight."""
        return self.scale_OG.repeat_interleave(width // self.scale_OG.shape[1], dim=1)

    def bounds(self, width: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest level (O, I) of each weight: its multiples of the scale."""
        repeats = width // self.zero_OG.shape[1]
        zero_OI = self.zero_OG.repeat_interleave(repeats, dim=1)
        return self.options.lowest - zero_OI, self.options.highest - zero_OI

    def levels(self, w_OI: Tensor) -> Tensor:
        """Nearest level of each weight, an integer."""
        level_OGI = self._grouped(w_OI) / self.scale_OG.unsqueeze(2)
        return self._clamp(level_OGI.round_()).flatten(1)

    def values(self, level_OI: Tensor) -> Tensor:
        """Weights that levels stand for; level 0 is zero."""
        return (self._grouped(level_OI) * self.scale_OG.unsqueeze(2)).flatten(1)

    def nearest(self, w_OI: Tensor) -> Tensor:
        """Value of the grid that is nearest to each weight.

        Differentiable with respect to scales and zero points, rounding taken as the identity; not
        with respect to the weights.
        """
        apply: Callable[..., Tensor] = _Nearest.apply
        return apply(w_OI, self.options, self.scale_OG, self.zero_OG)

    def _grouped(self, w_OI: Tensor) -> Tensor:
        grouped_OGI: Tensor = w_OI.unflatten(1, (self.scale_OG.shape[1], -1))
        return grouped_OGI

    def _clamp(self, level_OGI: Tensor) -> Tensor:
        """Clamp whole numbers to the levels there are, in place."""
        if self.options.symmetric:
            return level_OGI.clamp_(self.options.lowest, self.options.highest)
        zero_OG1 = self.zero_OG.unsqueeze(2)
        return level_OGI.clamp_(self.options.lowest - zero_OG1, self.options.highest - zero_OG1)


class _Nearest(Function):
    """level · scale, level = clamp(round(w / scale), lowest − zero, highest − zero).

    Where nothing is clamped ∂/∂scale = level − w / scale and ∂/∂zero = 0; elsewhere they are
    level and −scale.
    """

    @staticmethod
    def forward(
        ctx: Any, w_OI: Tensor, options: GridOptions, scale_OG: Tensor, zero_OG: Tensor
    ) -> Tensor:
        grid = Grid(options, scale_OG, zero_OG)
        ctx.save_for_backward(w_OI, scale_OG, zero_OG)
        ctx.options = options
        level_OI = grid.levels(w_OI)
        return grid._grouped(level_OI).mul_(scale_OG.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w_OI, scale_OG, zero_OG = ctx.saved_tensors
        (gradient_OI,) = gradients
        grid = Grid(ctx.options, scale_OG, zero_OG)
        gradient_OGI = grid._grouped(gradient_OI)
        ratio_OGI = grid._grouped(w_OI) / scale_OG.unsqueeze(2)
        rounded_OGI = ratio_OGI.round()
        level_OGI = grid._clamp(rounded_OGI.clone())
        inside_OGI = rounded_OGI.eq_(level_OGI)
        gradient_zero = None
        if ctx.needs_input_grad[3]:
            outside_OGI = 1 - inside_OGI
            gradient_zero = outside_OGI.mul_(gradient_OGI).sum(2).mul_(scale_OG).neg_()
        slope_OGI = level_OGI.sub_(ratio_OGI.mul_(inside_OGI))
        return None, None, slope_OGI.mul_(gradient_OGI).sum(2), gradient_zero


@dataclass(frozen=True)
class Clipping:
    """How much of the range of its kept weights each group's grid covers.

    Attributes:
        lower_OG: Share of the lowest weight, in (0, 1].
        upper_OG: Share of the highest weight, in (0, 1].
    """

    lower_OG: Tensor
    upper_OG: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Clipping]) -> Clipping:
        """The strengths of stacked rows."""
        return cls(
            torch.cat([part.lower_OG for part in parts]),
            torch.cat([part.upper_OG for part in parts]),
        )

    @classmethod
    def none(cls, w_OI: Tensor, options: GridOptions) -> Clipping:
        """The full range."""
        groups = w_OI.shape[1] // options.columns(w_OI.shape[1])
        one_OG = w_OI.new_ones(len(w_OI), groups)
        return cls(one_OG, one_OG)


def make_grid(
    w_OI: Tensor,
    mask_OI: Tensor,
    options: GridOptions,
    clipping: Clipping | None = None,
    stored: torch.dtype = torch.float32,
) -> Grid:
    """Lay a grid over the range of each group's kept weights.

    The range always includes zero. With n = 2^(bits−1) and a range from lo to hi,

        symmetric:   scale = max(hi / (n − 1), −lo / n),      zero = 0
        asymmetric:  scale = (hi − lo) / (2n − 1),            zero = round(−n − lo / scale)

    With clipping lo and hi are γ₀ · min and γ₁ · max of the kept weights: the learnable weight
    clipping of OmniQuant (Shao et al. 2024, arXiv 2308.13137, eq. 2), here for each end of a
    range that removed weights do not widen. Differentiable with respect to the strengths γ, with
    rounding taken as the identity. ``stored`` is the dtype that scales are saved in, and rounded
    to here.

    Raises:
        SecateurError: Groups do not divide the rows.
    """
    columns = options.columns(w_OI.shape[1])
    kept_OGI = (w_OI * mask_OI).unflatten(1, (-1, columns))
    low_OG, high_OG = kept_OGI.amin(2).clamp_max(0), kept_OGI.amax(2).clamp_min(0)
    if clipping is not None:
        low_OG, high_OG = low_OG * clipping.lower_OG, high_OG * clipping.upper_OG
    if options.symmetric:
        scale_OG = torch.maximum(high_OG / options.highest, low_OG / options.lowest)
    else:
        scale_OG = (high_OG - low_OG) / (options.highest - options.lowest)
    # A group without kept weights takes any scale.
    scale_OG = scale_OG.where(scale_OG > 0, 1.0)
    scale_OG = representable(scale_OG, stored)
    if options.symmetric:
        return Grid(options, scale_OG, torch.zeros_like(scale_OG))
    zero_OG = _round(options.lowest - low_OG / scale_OG).clamp(options.lowest, options.highest)
    return Grid(options, scale_OG, zero_OG)


def representable(scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    """Round scales to a dtype, none of them to zero."""
    return scale_OG.clamp_min(torch.finfo(stored).tiny).to(stored).to(scale_OG.dtype)


def search_clipping(
    w_OI: Tensor,
    mask_OI: Tensor,
    square_I: Tensor,
    options: GridOptions,
    stored: torch.dtype = torch.float32,
) -> Clipping:
    """Shorten each group's range to where rounding costs least: Σ square_i · (w_i − ŵ_i)².

    ``square_I`` is the mean squared input of each column; the rest as for ``make_grid``.
    """
    whole = Clipping.none(w_OI, options)
    best_OG = whole.lower_OG
    least_OG = torch.full_like(best_OG, torch.inf)
    for share in _SHARES:
        share_OG = torch.full_like(best_OG, share)
        grid = make_grid(w_OI, mask_OI, options, Clipping(share_OG, share_OG), stored)
        error_OI = (grid.values(grid.levels(w_OI)) - w_OI).square_().mul_(square_I).mul_(mask_OI)
        cost_OG = error_OI.unflatten(1, (best_OG.shape[1], -1)).sum(2)
        better_OG = cost_OG < least_OG
        best_OG = share_OG.where(better_OG, best_OG)
        least_OG = cost_OG.where(better_OG, least_OG)
    return Clipping(best_OG, best_OG)


@dataclass(frozen=True)
class QuantizedSolution:
    """Weights on a grid.

    Attributes:
        level_OI: Multiples of the scale, integers as floating point, 0 outside the mask.
        grid: The grid with its final scales.
        notes: Fallbacks that were needed, one sentence each.
    """

    level_OI: Tensor
    grid: Grid
    notes: tuple[str, ...] = ()

    @property
    def w_OI(self) -> Tensor:
        """The weights."""
        return self.grid.values(self.level_OI)

    def rows(self, rows: slice) -> QuantizedSolution:
        """The solution for some rows."""
        return replace(self, level_OI=self.level_OI[rows], grid=self.grid.rows(rows))

    def rows_from(self, other: QuantizedSolution, rows: slice) -> QuantizedSolution:
        """The solution with some rows of another one."""
        level_OI, scale_OG = self.level_OI.clone(), self.grid.scale_OG.clone()
        level_OI[rows], scale_OG[rows] = other.level_OI[rows], other.grid.scale_OG[rows]
        return replace(self, level_OI=level_OI, grid=self.grid.with_scales(scale_OG))


def round_to_grid(w_OI: Tensor, mask_OI: Tensor, grid: Grid) -> QuantizedSolution:
    """Take the nearest value for each kept weight."""
    return QuantizedSolution(grid.levels(w_OI) * mask_OI, grid)


def _round(values: Tensor) -> Tensor:
    """Round to integers; the derivative is that of the identity."""
    return values + (values.detach().round() - values.detach())
