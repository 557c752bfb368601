"""Which units a sub-block keeps at every width, and the output matrix fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.shrinking.units import SubBlock, Width
from secateur.solvers.elimination import Elimination, eliminate, nested_losses
from secateur.solvers.ridge import cut_loss, ridge_refit

# Pulls towards the old weights to choose from, as fractions of the mean diagonal.
_DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class OutputFit:
    """What became of an output matrix.

    Attributes:
        v_OK: for the kept columns, fp32.
        loss: squared change of the output per held-out token.
        plain_loss: the same with the old columns.
    """

    v_OK: Tensor
    loss: float
    plain_loss: float

    @property
    def changed(self) -> bool:
        """Whether it is anything but the old columns."""
        return self.loss < self.plain_loss


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """An order of the units of a sub-block, and one of the query heads inside each of them.

    What is kept at a width is part of what is kept with more units or with more query heads.

    Attributes:
        sub_block: the sub-block.
        w_OI: its dense output matrix, fp32 or float64.
        gram_II: mean of x xᵀ of its input, to order and to fit by.
        units: elimination of whole units.
        heads: of query heads, in rounds that take one of every group; None if groups stay whole.
    """

    sub_block: SubBlock
    w_OI: Tensor
    gram_II: Tensor
    units: Elimination
    heads: Elimination | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks that were needed, the same for both."""
        return self.units.notes

    def kept(self, width: Width) -> Tensor:
        """What stays at a width."""
        units_K = self.units.order_U[self.sub_block.units - width.units :].sort().values
        if width.queries == self.sub_block.heads_per_unit:
            return units_K.cpu()
        return self._last_queries(width.queries)[units_K].sort().values.cpu()

    def fit(
        self, width: Width, held_out_II: Tensor, dtype: torch.dtype = torch.float32
    ) -> OutputFit:
        """The output matrix at a width (``fit_output``)."""
        columns_K = self.sub_block.columns(self.kept(width)).to(self.w_OI.device)
        return fit_output(self.w_OI, self.gram_II, held_out_II, columns_K, dtype)

    def losses(self, widths: Sequence[Width]) -> list[float]:
        """Loss of each width, the kept columns fitted anew for each (``nested_losses``)."""
        losses = {queries: self._losses(queries) for queries in {each.queries for each in widths}}
        return [losses[width.queries][self.sub_block.units - width.units] for width in widths]

    def _losses(self, queries: int) -> list[float]:
        """Losses with ``queries`` heads in each group, by the number of groups that are gone."""
        groups, heads = self.sub_block.whole
        if queries == heads:
            return [0.0, *self.units.losses_U.tolist()]
        assert self.heads is not None
        gone = groups * (heads - queries)
        last_H = self._last_queries(queries)[self.units.order_U].flatten()
        order_H = torch.cat([self.heads.order_U[:gone], last_H])
        losses_H = nested_losses(self.w_OI, self.gram_II, order_H, self.sub_block.head_dim)
        found: list[float] = losses_H[gone - 1 :: queries].tolist()
        return found

    def _last_queries(self, queries: int) -> Tensor:
        """The query heads of each group that go last, (groups, queries), first removed first."""
        assert self.heads is not None
        groups, heads = self.sub_block.whole
        order_H = self.heads.order_U
        by_group = (order_H // heads).argsort(stable=True)
        return order_H[by_group].view(groups, heads)[:, heads - queries :]


def order_units(
    sub_block: SubBlock, w_OI: Tensor, gram_II: Tensor, *, queries: bool = False
) -> UnitOrder:
    """Order units by what it costs to do without them (``eliminate``), and query heads if asked.

    Raises:
        SecateurError: weights or Gram matrix are not finite.
    """
    units = eliminate(w_OI, gram_II, sub_block.columns_UP.shape[1])
    heads = None
    if queries:
        heads = eliminate(w_OI, gram_II, sub_block.head_dim, groups=sub_block.units)
    return UnitOrder(sub_block, w_OI, gram_II, units, heads)


def fit_output(
    w_OI: Tensor,
    fitted_II: Tensor,
    held_out_II: Tensor,
    kept_K: Tensor,
    dtype: torch.dtype = torch.float32,
) -> OutputFit:
    """Refit the kept columns with the damping that held-out tokens like best, if any helps.

    Args:
        w_OI: dense output matrix, fp32.
        fitted_II: mean of x xᵀ over the tokens to fit to.
        held_out_II: the same over others.
        kept_K: columns that are left; may be none.
        dtype: of the file, to which new weights are rounded.
    """
    plain_OK = w_OI[:, kept_K]
    plain = float(cut_loss(w_OI, plain_OK, kept_K, held_out_II))
    best = OutputFit(plain_OK, plain, plain)
    last = float("inf")
    for damping in _DAMPINGS if len(kept_K) else ():
        v_OK = ridge_refit(w_OI, fitted_II, kept_K, damping).to(dtype).float()
        loss = float(cut_loss(w_OI, v_OK, kept_K, held_out_II))
        if loss < best.loss:
            best = OutputFit(v_OK, loss, plain)
        if loss > last:
            break
        last = loss
    return best
