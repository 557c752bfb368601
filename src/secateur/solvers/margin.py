"""What a linear's weights cost to remove, and rows whose marginal weights cost alike.

Removing weight w_rj is expected to raise the loss by g_r · w_rj² · mean(x_j²), with g_r the
sensitivity of the loss to row r. Costs are the square roots,

    cost_rj = g_r^½ · |w_rj| · mean(x_j²)^½ ,

computed a few rows at a time whenever they are needed: only one number for each row and one for
each column is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.solvers.pieces import row_chunks, smallest

# A threshold is estimated from one weight in this many.
_SAMPLED = 13


@dataclass(frozen=True)
class RowCosts:
    """What it costs to remove each weight of a linear.

    Attributes:
        w_OI: Weights, fp32.
        norm_I: Root mean square of each input.
        root_O: Square root of each row's sensitivity; the one thing that changes.
    """

    w_OI: Tensor
    norm_I: Tensor
    root_O: Tensor

    def of(self, rows: slice) -> Tensor:
        """Costs of some rows."""
        return self.w_OI[rows].abs().mul_(self.norm_I).mul_(self.root_O[rows, None])

    def sample(self) -> Tensor:
        """Costs of weights at regular distances."""
        columns = self.w_OI.shape[1]
        taken_N = torch.arange(0, self.w_OI.numel(), _SAMPLED, device=self.w_OI.device)
        row_N = taken_N // columns
        column_N = taken_N - row_N * columns
        costs_N = self.w_OI[row_N, column_N].abs_()
        return costs_N.mul_(self.norm_I[column_N]).mul_(self.root_O[row_N])


def margin_threshold(costs: Iterable[RowCosts], share: float) -> float:
    """About the cost below which a share of all weights lies; positive."""
    sample_N = torch.cat([each.sample() for each in costs])
    rank = min(max(1, round(share * len(sample_N))), len(sample_N))
    # The square of the threshold is positive too.
    found = float(sample_N.kthvalue(rank).values)
    return max(found, math.sqrt(torch.finfo(torch.float32).tiny))


def cheapest(costs: Sequence[RowCosts], zeros: int) -> list[Tensor]:
    """Masks, True = kept, that remove exactly the ``zeros`` cheapest weights of all linears."""

    def pieces() -> Iterator[Tensor]:
        return (each.of(rows) for each in costs for rows in row_chunks(each.w_OI))

    removed = smallest(pieces, zeros)
    masks = []
    for each in costs:
        mask_OI = torch.empty(each.w_OI.shape, dtype=torch.bool, device=each.w_OI.device)
        for rows in row_chunks(mask_OI):
            torch.logical_not(next(removed), out=mask_OI[rows])
        masks.append(mask_OI)
    return masks


def follow_margin(root_O: Tensor, slope_O: Tensor, threshold: float, pull: float) -> None:
    """Scale each row's costs by the loss's slope at the row's margin, in place.

    At the best rates the last weight removed from every row raises the loss alike: by the expected
    T = threshold², and by the measured slope s of ``solvers.besa``. The row's costs are multiplied
    by the root of exp(pull · clip(s / T, −1, 1)).
    """
    root_O.mul_((slope_O / threshold**2).clamp_(-1, 1).mul_(pull / 2).exp_())
