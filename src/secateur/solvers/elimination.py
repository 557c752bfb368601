"""Order the input units of a matrix by what it costs to do without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.solvers.gram import (
    check_finite,
    damped_cholesky,
    live_columns,
    mean_diagonal,
    normalised_gram,
)
from secateur.solvers.scores import check_units

# Columns removed before the large matrices are brought up to date by one GEMM.
_PENDING = 128
# Removed columns leave the large matrices once this share of their columns is left.
_COMPACT = 0.9
# Least damping of a unit Gram matrix, in roundings of its dtype: the inverse stays accurate.
_FLOOR = 100
# What is added to the inverse's diagonal, in roundings of its largest entry.
_NOISE = 4


@dataclass(frozen=True)
class Elimination:
    """The order in which units are best removed; every prefix of it is a width.

    Attributes:
        order_U: Units, first removed first; int64.
        losses_U: losses_U[k] is the loss with the first k + 1 of them removed (``nested_losses``).
        notes: Fallbacks that were needed, one sentence each.
    """

    order_U: Tensor
    losses_U: Tensor
    notes: tuple[str, ...] = ()


def eliminate(
    w_OI: Tensor, gram_II: Tensor, unit: int = 1, damping: float = 0.01, groups: int = 1
) -> Elimination:
    """Remove one unit after the other, always the one whose loss is least.

    Optimal brain surgeon for groups of columns (ZipLM, Kurtic et al. 2023, arXiv 2302.04089): with
    H = G + damping · mean(diag G) · I and P = H⁻¹ the cheapest unit q has the lowest

        tr(W_q P_qq⁻¹ W_qᵀ),

    and what is left of W makes up for it: W ← W − W_q P_qq⁻¹ P_q:, P ← P − P_:q P_qq⁻¹ P_q:. The
    scores need no more of W than A = WᵀW, so A and P are what is kept. A removal is written as
    low-rank terms to both, which are applied for many units at once. The result is exact, one unit
    at a time; work is O(I³ + O · I²), nearly all of it in matrix products, and memory about five
    matrices like G.

    Ties go by position; units that are zero on all tokens cost nothing and go first. For a target
    that is not the matrix's own output, let ``w_OI`` be the ridge solution on all columns: the
    loss then lacks a constant.

    Args:
        w_OI: Output matrix.
        gram_II: Of its input; a sum over tokens will do.
        unit: Consecutive columns that make a unit.
        damping: See ``solvers``.
        groups: Number of equal groups of consecutive units. They lose units in rounds, one from
            each group in a round.

    Raises:
        SecateurError: Units do not fill the columns.
    """
    weights_OI, scaled_II, _ = _scaled_problem(w_OI, gram_II, unit, damping)
    factor = damped_cholesky(scaled_II, _floor(scaled_II))
    notes, inverse_II = factor.notes, torch.cholesky_inverse(factor.lower_II)
    del scaled_II, factor
    order_U = _Units(weights_OI, inverse_II, unit, groups).remove_all()
    losses_U = nested_losses(w_OI, gram_II, order_U, unit, damping)
    return Elimination(order_U, losses_U, notes)


def nested_losses(
    w_OI: Tensor, gram_II: Tensor, order_U: Tensor, unit: int = 1, damping: float = 0.01
) -> Tensor:
    """Loss of every width of a given order, the kept columns fitted anew for each; float64.

    The loss of removing the columns R is the minimum of (W − V) H (W − V)ᵀ, summed over rows, over
    all V that are zero in R, with the damped Gram matrix H. With the columns that go last in front
    and H = L Lᵀ it is Σ_{j in R} ‖(W L)_:j‖², so that one factor serves all widths.

    Args are those of ``eliminate``; ``order_U`` are all units, first removed first. Entry k of
    losses_U is the loss without the first k + 1 of them.
    """
    weights_OI, scaled_II, mean = _scaled_problem(w_OI, gram_II, unit, damping)
    kept_first_I = kept_first(order_U, unit)
    scaled_II = scaled_II.index_select(0, kept_first_I).index_select(1, kept_first_I)
    lower_II = damped_cholesky(scaled_II, _floor(scaled_II)).lower_II
    loss_I = (weights_OI.index_select(1, kept_first_I) @ lower_II).square_().sum(0).double()
    return loss_I.view(-1, unit).sum(1).flip(0).cumsum(0) * mean


def kept_first(order_U: Tensor, unit: int = 1) -> Tensor:
    """Columns (I,), those that are removed last in front: every width is a slice of these."""
    within = torch.arange(unit, device=order_U.device)
    return (order_U.flip(0)[:, None] * unit + within).flatten()


def _scaled_problem(
    w_OI: Tensor, gram_II: Tensor, unit: int, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and damped Gram matrix in coordinates where its diagonal is 1, and its scale."""
    check_units(w_OI.shape[1], unit)
    check_finite("the weights", w_OI)
    check_finite("the Gram matrix's entries", gram_II)
    scaled_II, scale_I = normalised_gram(gram_II, damping)
    # Weights whose input is always zero are free to remove.
    weights_OI = w_OI * scale_I.where(live_columns(gram_II), 0)
    return weights_OI, scaled_II, mean_diagonal(gram_II)


def _floor(scaled_II: Tensor) -> float:
    return _FLOOR * torch.finfo(scaled_II.dtype).eps


class _Units:
    """The units that are left: P and A as of some steps ago, and what has changed since.

    P = inverse_II − Uᵀ U and A = product_II − Uᵀ V − Vᵀ U with the rows of the panels U and V
    that are in use; the diagonal blocks of both are always up to date.
    """

    def __init__(self, weights_OI: Tensor, inverse_II: Tensor, unit: int, groups: int) -> None:
        self.unit = unit
        self.within = torch.arange(unit, device=inverse_II.device)
        noise = inverse_II.diagonal().amax() * (_NOISE * torch.finfo(inverse_II.dtype).eps)
        inverse_II.diagonal().add_(noise)
        self.inverse_II = inverse_II
        self.product_II = weights_OI.T @ weights_OI
        self.inverse_Uss = _diagonal_blocks(self.inverse_II, unit)
        self.product_Uss = _diagonal_blocks(self.product_II, unit)
        self.name_U = torch.arange(len(self.inverse_Uss), device=inverse_II.device)
        self.removed_U = torch.zeros_like(self.name_U, dtype=torch.bool)
        self.left = len(self.name_U)
        self.group_U = self.name_U // (self.left // groups)
        self.lost_G = torch.zeros_like(self.name_U[:groups])
        self._clear_panels()

    def remove_all(self) -> Tensor:
        order_U = torch.empty_like(self.name_U)
        for step in range(len(order_U)):
            order_U[step] = self.remove_cheapest(step // len(self.lost_G))
        return order_U

    def remove_cheapest(self, finished: int) -> Tensor:
        """Remove a unit, of a group that has lost no more than ``finished``."""
        waits_U = self.lost_G[self.group_U] > finished
        chosen = self.scores().masked_fill(waits_U, torch.inf).argmin()
        name = self.name_U[chosen]
        self.removed_U[chosen] = True
        self.lost_G[self.group_U[chosen]] += 1
        self.left -= 1
        if self.left:
            self.record(chosen)
            if self.used + self.unit > len(self.u_RI):
                self.update()
        return name

    def scores(self) -> Tensor:
        """tr(A_qq P_qq⁻¹) of each unit, infinite for removed ones."""
        if self.unit == 1:
            score_U = (self.product_Uss / self.inverse_Uss).flatten()
        else:
            factor_Uss = torch.linalg.cholesky_ex(self.inverse_Uss).L
            solved_Uss = torch.cholesky_solve(self.product_Uss, factor_Uss)
            score_U = solved_Uss.diagonal(dim1=1, dim2=2).sum(-1)
        return score_U.masked_fill(self.removed_U, torch.inf)

    def record(self, chosen: Tensor) -> None:
        """Add the low-rank terms of one removal to the panels and to the diagonal blocks.

        With P_qq = C Cᵀ, u = C⁻¹ P_q: and g = C⁻¹ A_q: the removal takes uᵀ u from P, and from A
        uᵀ g + gᵀ u − uᵀ m u, where m = g_:q C⁻ᵀ; that is uᵀ v + vᵀ u with v = g − m u / 2.
        """
        columns = chosen * self.unit + self.within
        u_RI, v_RI = self.u_RI[: self.used], self.v_RI[: self.used]
        at_u_sR, at_v_sR = u_RI.index_select(1, columns).T, v_RI.index_select(1, columns).T
        inverse_sI = self.inverse_II.index_select(0, columns).addmm_(at_u_sR, u_RI, alpha=-1)
        product_sI = self.product_II.index_select(0, columns)
        product_sI.addmm_(at_u_sR, v_RI, alpha=-1).addmm_(at_v_sR, u_RI, alpha=-1)
        factor_ss = torch.linalg.cholesky_ex(self.inverse_Uss[chosen]).L
        whiten_ss = torch.linalg.solve_triangular(
            factor_ss, torch.eye(self.unit).to(factor_ss), upper=False
        )
        u_sI, v_sI = whiten_ss @ inverse_sI, whiten_ss @ product_sI
        middle_ss = v_sI.index_select(1, columns) @ whiten_ss.T
        v_sI.addmm_(middle_ss, u_sI, alpha=-0.5)
        self.u_RI[self.used : self.used + self.unit] = u_sI
        self.v_RI[self.used : self.used + self.unit] = v_sI
        self.used += self.unit
        u_Uss, v_Uss = self.by_unit(u_sI), self.by_unit(v_sI)
        self.inverse_Uss -= u_Uss.mT @ u_Uss
        cross_Uss = u_Uss.mT @ v_Uss
        self.product_Uss -= cross_Uss + cross_Uss.mT

    def by_unit(self, rows_sI: Tensor) -> Tensor:
        return rows_sI.view(self.unit, -1, self.unit).transpose(0, 1)

    def update(self) -> None:
        """Apply the panels to the large matrices and drop removed columns if there are many."""
        u_RI, v_RI = self.u_RI[: self.used], self.v_RI[: self.used]
        self.inverse_II.addmm_(u_RI.T, u_RI, alpha=-1)
        self.product_II.addmm_(u_RI.T, v_RI, alpha=-1).addmm_(v_RI.T, u_RI, alpha=-1)
        if self.left <= _COMPACT * len(self.name_U):
            self.compact()
        self._clear_panels()

    def compact(self) -> None:
        kept = (~self.removed_U).nonzero().flatten()
        columns = (kept[:, None] * self.unit + self.within).flatten()
        self.inverse_II = self.inverse_II.index_select(0, columns).index_select(1, columns)
        self.product_II = self.product_II.index_select(0, columns).index_select(1, columns)
        self.inverse_Uss = self.inverse_Uss[kept]
        self.product_Uss = self.product_Uss[kept]
        self.name_U = self.name_U[kept]
        self.group_U = self.group_U[kept]
        self.removed_U = torch.zeros_like(self.name_U, dtype=torch.bool)

    def _clear_panels(self) -> None:
        rows = max(_PENDING, self.unit)
        self.u_RI = self.inverse_II.new_empty(rows, len(self.inverse_II))
        self.v_RI = torch.empty_like(self.u_RI)
        self.used = 0


def _diagonal_blocks(matrix_II: Tensor, unit: int) -> Tensor:
    units = len(matrix_II) // unit
    blocks_ssU = matrix_II.view(units, unit, units, unit).diagonal(dim1=0, dim2=2)
    return blocks_ssU.permute(2, 0, 1).clone()
