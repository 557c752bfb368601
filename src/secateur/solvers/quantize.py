"""Weights on a grid whose outputs stay close: error feedback, descent, refitted scales."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.gram import check_finite, damped_cholesky, live_columns, mean_diagonal
from secateur.solvers.grids import Grid, QuantizedSolution, representable, round_to_grid

# Up to this number columns are settled one by one; more are halved and coupled by one GEMM.
_LEAF = 16
# Columns whose changes reach all others together.
_BLOCK = 128
# Numbers in the largest temporary of a refit of scales.
_TEMPORARY = 2**24


def quantize(
    w_OI: Tensor,
    mask_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    rounds: int = 2,
    stored: torch.dtype = torch.float32,
) -> QuantizedSolution:
    """Find levels and scales whose outputs are close to those of the weights.

    For each row (v − w) (G + damping · mean(diag G) · I) (v − w)ᵀ is made small. An
    error-feedback sweep comes first; then ``rounds`` times the scales are refitted in closed form
    and a pass of coordinate descent goes over the levels. A row that ends above plain rounding is
    rounded, so none ends worse.

    Args:
        w_OI: Weights, zero outside the mask.
        mask_OI: True = kept.
        gram_II: Of their inputs.
        grid: Where the values lie at first.
        damping: See ``solvers``.
        rounds: Refits of the scales, each with a pass over the levels.
        stored: Dtype that scales are saved in.
    """
    check_finite("the weights", w_OI)
    level_OI, notes = error_feedback(w_OI, mask_OI, gram_II, grid, damping)
    ridge_II = _ridge(gram_II, damping)
    fitted = grid
    level_OI = descend(w_OI, level_OI, mask_OI, ridge_II, fitted)
    for _ in range(rounds):
        scale_OG = refit_scales(w_OI, level_OI, ridge_II, fitted)
        fitted = fitted.with_scales(representable(scale_OG, stored))
        level_OI = descend(w_OI, level_OI, mask_OI, ridge_II, fitted)
    rounded = round_to_grid(w_OI, mask_OI, grid)
    loss_O = _loss(fitted.values(level_OI) - w_OI, ridge_II)
    better_O1 = (loss_O <= _loss(rounded.w_OI - w_OI, ridge_II))[:, None]
    return QuantizedSolution(
        level_OI.where(better_O1, rounded.level_OI),
        fitted.with_scales(fitted.scale_OG.where(better_O1, grid.scale_OG)),
        notes,
    )


def error_feedback(
    w_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, grid: Grid, damping: float = 0.01
) -> tuple[Tensor, tuple[str, ...]]:
    """Round columns one after the other; those to come make up for the errors so far.

    GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1) on the support of a mask. As in
    ``sparsegpt``, with the factor G = R Rᵀ, R upper triangular, a change δ of a row costs ‖δR‖²,
    whose term j involves columns up to j only. A kept column aims at the value that would cancel
    its term, w_j − Σ_{i<j} δ_i R_ij / R_jj, and takes the nearest of its grid. A removed column
    does not change. Columns with large inputs go first, while many columns are left to make up
    for their errors; scales and zero points stay as they are.

    Returns:
        level_OI, and what the factorisation had to fall back to.
    """
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    sorted_II = gram_II[order_I][:, order_I]
    factor = damped_cholesky(sorted_II.flip((0, 1)), damping)
    r_II = factor.lower_II.flip((0, 1))
    sweep = _Sweep(w_OI, mask_OI, r_II, grid, order_I)
    sweep.run(0, w_OI.shape[1])
    level_OI = torch.empty_like(w_OI)
    level_OI[:, order_I] = sweep.level_IO.T
    return level_OI, factor.notes


class _Columns:
    """Weights and their grids with columns as rows, so that every step is contiguous."""

    def __init__(self, w_OI: Tensor, mask_OI: Tensor, grid: Grid, order_I: Tensor) -> None:
        def columns(values_OI: Tensor) -> Tensor:
            return values_OI.T[order_I].contiguous()

        width = w_OI.shape[1]
        lowest_OI, highest_OI = grid.bounds(width)
        self.w_IO = columns(w_OI)
        self.mask_IO = columns(mask_OI.to(w_OI.dtype))
        self.scale_IO = columns(grid.scales(width))
        self.lowest_IO, self.highest_IO = columns(lowest_OI), columns(highest_OI)

    def nearest(self, column: int, value_O: Tensor) -> Tensor:
        """Levels of one column."""
        level_O = (value_O / self.scale_IO[column]).round_()
        torch.clamp(level_O, self.lowest_IO[column], self.highest_IO[column], out=level_O)
        return level_O.mul_(self.mask_IO[column])


class _Sweep(_Columns):
    """State of one sweep."""

    def __init__(
        self, w_OI: Tensor, mask_OI: Tensor, r_II: Tensor, grid: Grid, order_I: Tensor
    ) -> None:
        super().__init__(w_OI, mask_OI, grid, order_I)
        # lower[j, i] = R_ij / R_jj: how much a change of column i moves column j.
        self.lower_II = (r_II.T / r_II.diagonal()[:, None]).contiguous()
        # Rows of columns not reached yet hold the response to the changes made so far.
        self.delta_IO = torch.zeros_like(self.w_IO)
        self.level_IO = torch.zeros_like(self.w_IO)

    def run(self, lo: int, hi: int) -> None:
        """Settle the columns [lo, hi), given that all changes to their left are in `delta_IO`."""
        if hi - lo <= _LEAF:
            self.settle(lo, hi)
            return
        mid = lo + (hi - lo + _LEAF - 1) // _LEAF // 2 * _LEAF
        self.run(lo, mid)
        self.delta_IO[mid:hi].addmm_(self.lower_II[mid:hi, lo:mid], self.delta_IO[lo:mid], alpha=-1)
        self.run(mid, hi)

    def settle(self, lo: int, hi: int) -> None:
        for j in range(lo, hi):
            row_O = self.delta_IO[j]
            if j > lo:
                row_O.addmv_(self.delta_IO[lo:j].T, self.lower_II[j, lo:j], alpha=-1)
            self.level_IO[j] = self.nearest(j, self.w_IO[j] + row_O)
            torch.mul(self.level_IO[j], self.scale_IO[j], out=row_O)
            row_O.sub_(self.w_IO[j])


def descend(
    w_OI: Tensor, level_OI: Tensor, mask_OI: Tensor, ridge_II: Tensor, grid: Grid
) -> Tensor:
    """Give each kept weight in turn the level that is best for its row; returns level_OI.

    With all others fixed, the best value of column j is v_j − (δH)_j / H_jj for δ = v − w and
    H = ``ridge_II``, symmetric with a positive diagonal. No row's loss rises. Unlike the sweep this
    knows the whole support: errors also reach columns to the left, and removed ones take none.
    """
    width = w_OI.shape[1]
    columns = _Columns(w_OI, mask_OI, grid, torch.arange(width, device=w_OI.device))
    level_IO = level_OI.T.contiguous()
    slope_IO = ridge_II @ (level_IO * columns.scale_IO - columns.w_IO)
    diagonal_I = ridge_II.diagonal()
    step_IO = torch.zeros_like(level_IO)
    for lo in range(0, width, _BLOCK):
        hi = min(lo + _BLOCK, width)
        for j in range(lo, hi):
            slope_O = slope_IO[j]
            if j > lo:
                slope_O = slope_O + ridge_II[j, lo:j] @ step_IO[lo:j]
            scale_O = columns.scale_IO[j]
            value_O = level_IO[j] * scale_O - slope_O / diagonal_I[j]
            new_O = columns.nearest(j, value_O)
            torch.mul(new_O - level_IO[j], scale_O, out=step_IO[j])
            level_IO[j] = new_O
        if hi < width:
            slope_IO[hi:].addmm_(ridge_II[hi:, lo:hi], step_IO[lo:hi])
    return level_IO.T.contiguous()


def refit_scales(w_OI: Tensor, level_OI: Tensor, ridge_II: Tensor, grid: Grid) -> Tensor:
    """Least squares for the scales on fixed levels; returns scale_OG.

    A row is Σ_g s_g u_g, u_g its levels in group g and zeros elsewhere, so the best scales solve
    Σ_h (u_g H u_hᵀ) s_h = u_g H wᵀ. Groups whose levels are all zero keep their scale, and so do
    rows for which a scale would not be positive.
    """
    groups = grid.scale_OG.shape[1]
    width = w_OI.shape[1]
    ridge_GII = ridge_II.view(groups, width // groups, width)
    scales = []
    step = max(1, _TEMPORARY // (groups * width))
    for start in range(0, len(w_OI), step):
        rows = slice(start, start + step)
        u_RGI, old_RG = level_OI[rows].unflatten(1, (groups, -1)), grid.scale_OG[rows]
        image_GRI = u_RGI.transpose(0, 1) @ ridge_GII
        missing_RI = w_OI[rows] - grid.rows(rows).values(level_OI[rows])
        right_RG = torch.einsum("gri,ri->rg", image_GRI, missing_RI)
        curvature_RGG = torch.einsum("grhi,rhi->rgh", image_GRI.unflatten(2, (groups, -1)), u_RGI)
        diagonal_RG = curvature_RGG.diagonal(dim1=1, dim2=2)
        empty_RG = diagonal_RG <= 0
        diagonal_RG.masked_fill_(empty_RG, 1)
        factor_RGG, failed_R = torch.linalg.cholesky_ex(curvature_RGG)
        change_RG = torch.cholesky_solve(right_RG[..., None], factor_RGG).squeeze(2)
        new_RG = old_RG + change_RG.masked_fill(empty_RG, 0)
        good_R1 = ((new_RG > 0).all(1) & (failed_R == 0))[:, None]
        scales.append(new_RG.where(good_R1, old_RG))
    return torch.cat(scales)


def _ridge(gram_II: Tensor, damping: float) -> Tensor:
    """G + damping · mean(diag G) · I, dead columns with the mean as their diagonal."""
    ridge_II = gram_II.clone()
    mean = mean_diagonal(gram_II)
    ridge_II.diagonal().add_(mean * ((~live_columns(gram_II)).to(gram_II.dtype) + damping))
    return ridge_II


def _loss(delta_OI: Tensor, ridge_II: Tensor) -> Tensor:
    return (delta_OI @ ridge_II).mul_(delta_OI).sum(1)
