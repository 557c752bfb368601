"""Which units, and which query heads of each, a sub-block keeps at every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.shrinking.units import SubBlock, Width
from secateur.solvers.elimination import Elimination, eliminate, nested_losses


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """An order of the units, and one of the query heads inside each of them.

    What is kept at a width is part of what is kept with more units or with more query heads.

    Attributes:
        sub_block: whose units they are.
        units: elimination of whole units.
        heads: of query heads, in rounds that take one of every group; None if groups stay whole.
    """

    sub_block: SubBlock
    units: Elimination
    heads: Elimination | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks that were needed, the same for both."""
        return self.units.notes

    def kept(self, width: Width) -> Tensor:
        """What stays at a width, as ``units`` has it."""
        units_K = self.units.order_U[self.sub_block.units - width.units :].sort().values
        if width.queries == self.sub_block.heads_per_unit:
            return units_K.cpu()
        return self._last_queries(width.queries)[units_K].sort().values.cpu()

    def losses(self, w_OI: Tensor, gram_II: Tensor, widths: Sequence[Width]) -> list[float]:
        """Loss of each width, the kept columns fitted anew for each (``nested_losses``).

        Args:
            w_OI: the matrix that the order is of.
            gram_II: its Gram matrix.
            widths: those that are wanted.
        """
        queries = {width.queries for width in widths}
        losses = {count: self._losses(w_OI, gram_II, count) for count in queries}
        return [losses[width.queries][self.sub_block.units - width.units] for width in widths]

    def _losses(self, w_OI: Tensor, gram_II: Tensor, queries: int) -> list[float]:
        """Losses with so many query heads in each group, by the number of groups that are gone."""
        groups, heads = self.sub_block.whole
        if queries == heads:
            return [0.0, *self.units.losses_U.tolist()]
        assert self.heads is not None
        gone = groups * (heads - queries)
        last_H = self._last_queries(queries)[self.units.order_U].flatten()
        order_H = torch.cat([self.heads.order_U[:gone], last_H])
        losses_H = nested_losses(w_OI, gram_II, order_H, self.sub_block.head_dim)
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
    """Order the units of a sub-block by what it costs to do without them (``eliminate``).

    Args:
        sub_block: whose units they are.
        w_OI: its dense output matrix, fp32 or float64.
        gram_II: the Gram matrix of its input.
        queries: order the query heads of each group too.

    Raises:
        SecateurError: weights or Gram matrix are not finite.
    """
    units = eliminate(w_OI, gram_II, sub_block.columns_UP.shape[1])
    heads = None
    if queries:
        heads = eliminate(w_OI, gram_II, sub_block.head_dim, groups=sub_block.units)
    return UnitOrder(sub_block, units, heads)
