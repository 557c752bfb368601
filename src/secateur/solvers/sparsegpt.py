"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.patterns.pattern import NM, Budget, keep_highest, lowest, proportional_counts
from secateur.solvers.gram import SparseSolution, check_finite, damped_cholesky, live_columns

# Up to this number columns are eliminated one by one; more are halved and coupled by one GEMM.
_LEAF = 16


def sparsegpt(
    w_OI: Tensor,
    gram_II: Tensor,
    budget: Budget,
    *,
    damping: float = 0.01,
    column_block: int = 128,
) -> SparseSolution:
    """Prune columns from left to right and let the columns to the right make up for it.

    The paper updates weights with the Cholesky factor of the inverse Gram matrix. The same
    weights come, without any inverse, from the factor G = R Rᵀ, R upper triangular. The change δ
    of a row costs ‖δR‖², whose term j involves columns up to j only. So a kept column cancels
    its term with δ_j = −Σ_{i<j} δ_i R_ij / R_jj, and pruning it costs (w_j R_jj)², w_j being the
    weight after that update: the paper's w_j² / [U_jj]².

    Unstructured zeros are spread in proportion over blocks of ``column_block`` columns; within a
    block's slice of a linear the cheapest weights go. An n:m group is chosen when its first column
    is reached.
    """
    budget.check_fits(*w_OI.shape)
    check_finite("the weights", w_OI)
    factor = damped_cholesky(gram_II.flip((0, 1)), damping)
    r_II = factor.lower_II.flip((0, 1))
    sweep = _Sweep(w_OI, r_II, live_columns(gram_II), budget, column_block)
    sweep.run(0, w_OI.shape[1])
    return SparseSolution(*sweep.result(), factor.notes)


class _Sweep:
    """State of one sweep. Columns are stored as rows, so that every step is contiguous."""

    def __init__(
        self, w_OI: Tensor, r_II: Tensor, live_I: Tensor, budget: Budget, column_block: int
    ) -> None:
        width = w_OI.shape[1]
        pivot_I = r_II.diagonal()
        # lower[j, i] = R_ij / R_jj: how much a change of column i moves column j.
        self.lower_II = (r_II.T / pivot_I[:, None]).contiguous()
        self.cost_I1 = pivot_I.where(live_I, 0)[:, None]
        self.minus_w_IO = w_OI.T.neg().contiguous()
        # Rows of columns not reached yet hold the response to the changes made so far.
        self.delta_IO = torch.zeros_like(self.minus_w_IO)
        self.kept_IO = torch.ones_like(self.minus_w_IO, dtype=torch.bool)
        self.budget = budget
        if isinstance(budget.pattern, NM):
            self.unit = budget.pattern.m
        else:
            self.unit = column_block
            blocks = [min(column_block, width - lo) for lo in range(0, width, column_block)]
            self.counts = [
                proportional_counts(zeros, [rows * block for block in blocks])
                for rows, zeros in zip(budget.rows, budget.zeros, strict=True)
            ]

    def run(self, lo: int, hi: int, chosen: bool = False) -> None:
        """Settle the columns [lo, hi), given that all changes to their left are in `delta_IO`."""
        if not chosen and hi - lo <= self.unit:
            self.kept_IO[lo:hi] = self.choose(lo, hi)
            chosen = True
        if chosen and hi - lo <= _LEAF:
            self.eliminate(lo, hi)
            return
        step = _LEAF if chosen else self.unit
        mid = lo + (hi - lo + step - 1) // step // 2 * step
        self.run(lo, mid, chosen)
        self.delta_IO[mid:hi].addmm_(self.lower_II[mid:hi, lo:mid], self.delta_IO[lo:mid], alpha=-1)
        self.run(mid, hi, chosen)

    def choose(self, lo: int, hi: int) -> Tensor:
        # What the columns would be if all of them were kept: the paper's weights at this point.
        free_OB = torch.linalg.solve_triangular(
            self.lower_II[lo:hi, lo:hi].T,
            self.delta_IO[lo:hi].T,
            upper=True,
            left=False,
            unitriangular=True,
        )
        cost_BO = (free_OB.T - self.minus_w_IO[lo:hi]).abs_().mul_(self.cost_I1[lo:hi])
        if isinstance(self.budget.pattern, NM):
            return keep_highest(cost_BO, self.budget.pattern.n, dim=0)
        parts = [
            ~lowest(cost_BR.reshape(1, -1), [counts[lo // self.unit]]).view(cost_BR.shape)
            for cost_BR, counts in zip(
                cost_BO.split(self.budget.rows, dim=1), self.counts, strict=True
            )
        ]
        return torch.cat(parts, dim=1)

    def eliminate(self, lo: int, hi: int) -> None:
        for j in range(lo, hi):
            row_O = self.delta_IO[j]
            if j > lo:
                row_O.addmv_(self.delta_IO[lo:j].T, self.lower_II[j, lo:j], alpha=-1)
            torch.where(self.kept_IO[j], row_O, self.minus_w_IO[j], out=row_O)

    def result(self) -> tuple[Tensor, Tensor]:
        w_OI = self.delta_IO.sub_(self.minus_w_IO).T.contiguous()
        return w_OI, self.kept_IO.T.contiguous()
