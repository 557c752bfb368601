"""Which weights take part in the forward pass, chosen anew while they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from secateur.patterns.pattern import NM, Budget, Pattern, check_mask, select
from secateur.solvers.pieces import row_chunks


@dataclass(frozen=True)
class RowBudget:
    """What every row of a linear keeps; rows never trade zeros, so processes may share a matrix.

    Attributes:
        budget: pattern and zeros of the linear.
        row_zeros: zeros of each row; None for n:m, whose groups say it all.
    """

    budget: Budget
    row_zeros: tuple[int, ...] | None

    @classmethod
    def even(cls, pattern: Pattern, rows: int, zeros: int) -> RowBudget:
        """Zeros of a linear spread over its rows; those of rows differ by one at most."""
        budget = Budget(pattern, (rows,), (zeros,))
        if isinstance(pattern, NM):
            return cls(budget, None)
        bounds = [row * zeros // rows for row in range(rows + 1)]
        return cls(budget, tuple(after - before for before, after in pairwise(bounds)))

    @classmethod
    def of_mask(cls, pattern: Pattern, mask_OI: Tensor) -> RowBudget:
        """As many zeros in every row as the mask has.

        Raises:
            SecateurError: the mask has not the pattern.
        """
        counts = tuple((~mask_OI).sum(1).tolist())
        budget = Budget(pattern, (len(counts),), (sum(counts),))
        check_mask(mask_OI, budget)
        return cls(budget, None if isinstance(pattern, NM) else counts)

    def part(self, rows: slice) -> RowBudget:
        """What some of the rows keep."""
        pattern, whole = self.budget.pattern, self.budget.rows[0]
        first, behind, _ = rows.indices(whole)
        counts = None if self.row_zeros is None else self.row_zeros[rows]
        # Rows of an n:m linear have equally many zeros.
        zeros = self.budget.zeros[0] * (behind - first) // whole if counts is None else sum(counts)
        return RowBudget(Budget(pattern, (behind - first,), (zeros,)), counts)


def choose_mask(
    score_OI: Tensor, rows: RowBudget, kept_OI: Tensor | None = None, hysteresis: float = 0.0
) -> Tensor:
    """Keep the highest scores of each group or row; returns mask_OI, bool, True = kept.

    Args:
        score_OI: not negative.
        rows: what each row keeps.
        kept_OI: the mask so far.
        hysteresis: a removed weight comes back only if its score is higher than that of the
            weight it replaces by this share of it.

    Raises:
        SecateurError: a score is NaN.
    """
    if kept_OI is not None:
        score_OI = favoured(score_OI, kept_OI, hysteresis)
    return select(score_OI, rows.budget, row_zeros=rows.row_zeros)


def favoured(score_OI: Tensor, kept_OI: Tensor, hysteresis: float) -> Tensor:
    """Scores in which what is kept so far counts for more, by a share of it."""
    if hysteresis == 0:
        return score_OI
    kept = as_factor(kept_OI, score_OI.dtype)
    score_OI = torch.addcmul(score_OI, score_OI, kept, value=hysteresis)
    # Of scores that are all zero, as where no gradient arrives, the kept ones stay.
    return score_OI.add_(kept, alpha=torch.finfo(score_OI.dtype).tiny)


def renew_mask(
    mask_OI: Tensor,
    rows: RowBudget,
    score: Callable[[slice], Tensor],
    hysteresis: float = 0.0,
) -> Tensor:
    """Replace a mask in place by that of ``choose_mask``, a few rows at a time.

    Args:
        mask_OI: the mask so far.
        rows: what each row keeps.
        score: gives the scores of some of the rows, (rows, in), not negative.
        hysteresis: as for ``choose_mask``.

    Returns:
        How many entries changed, a number on the mask's device.
    """
    changed = torch.zeros((), dtype=torch.int64, device=mask_OI.device)
    for part in row_chunks(mask_OI):
        kept_PI = mask_OI[part]
        mask_PI = choose_mask(score(part), rows.part(part), kept_PI, hysteresis)
        changed += flips(kept_PI, mask_PI)
        kept_PI.copy_(mask_PI)
    return changed


def magnitude(weight: Tensor) -> Tensor:
    """|w|, the paper's score."""
    return weight.abs()


def sensitivity(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|w| · √v with Adam's second moment v of the gradient, after ELSA (arXiv 2510.01650).

    Its square is, up to a factor, how much the loss is expected to rise when w is removed.
    """
    return weight.abs().mul_(second_moment.sqrt())


def as_factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where True, 0 elsewhere; converting from bytes is several times faster than from bools."""
    return mask.view(torch.uint8).to(dtype)


def flips(before: Tensor, after: Tensor) -> Tensor:
    """How many entries of two masks differ, a number on their device."""
    return torch.count_nonzero(before ^ after)
