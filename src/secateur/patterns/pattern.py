"""Sparsity patterns, exact budgets, and the masks that meet them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from secateur.runs.errors import SecateurError, shortened

# Among which weights zeros are divided, or exchanged: those of a row, a column, a linear, or of all
# linears of a block or a part of it. Options of stages allow some of these.
Scope = Literal["row", "column", "linear", "block"]

# No linear has more input columns.
_LARGEST_GROUP = 2**20
# Up to this group size comparing all pairs is faster than a stable sort.
_PAIRWISE_GROUP = 16
# Groups of these sizes fit into an integer, one byte for each member.
_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# This many scores stay in a processor's cache through all operations on them.
_CACHED = 2**17


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere.

    Attributes:
        sparsity: Zeros / weights, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise SecateurError(
                f"sparsity {self.sparsity} is not in [0, 1); give the share of weights to remove, "
                "such as 0.5"
            )

    def __str__(self) -> str:
        return repr(float(self.sparsity))


@dataclass(frozen=True)
class NM:
    """Keep n of every m consecutive input columns of each row.

    Attributes:
        n: Weights kept in a group, 1 <= n <= m.
        m: Columns in a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m > _LARGEST_GROUP:
            raise SecateurError(
                f"pattern {self.n}:{self.m} has groups of {self.m} columns; give one of "
                f"{_LARGEST_GROUP} at most, or a sparsity"
            )
        if not 1 <= self.n <= self.m:
            raise SecateurError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights; "
                "give n:m with 1 <= n <= m, such as 2:4"
            )

    @property
    def sparsity(self) -> float:
        """Zeros / weights."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def parse_pattern(text: str) -> Pattern:
    """Read "0.5" or "50%" as unstructured and "2:4" as n:m; the inverse of `str(pattern)`.

    Raises:
        SecateurError: The text is neither, or its numbers are out of range.
    """
    text = text.strip()
    try:
        if ":" in text:
            n, m = text.split(":")
            return NM(int(n), int(m))
        if text.endswith("%"):
            return Unstructured(float(text[:-1]) / 100)
        return Unstructured(float(text))
    except ValueError:
        raise SecateurError(
            f"pattern {shortened(text, 40)!r} is not understood; give a sparsity such as 0.5 or "
            "50%, or n:m such as 2:4 (keep 2 of every 4)"
        ) from None


def read_pattern(value: object) -> Pattern:
    """Read a pattern as an option file gives it.

    Raises:
        SecateurError: it is none.
    """
    if isinstance(value, Unstructured | NM):
        return value
    if isinstance(value, int) and value > 1:
        # YAML 1.1 takes 2:4 for a number to the base of sixty.
        n, m = divmod(value, 60)
        raise SecateurError(
            f"The pattern was read as the number {value}; write it in quotes, such as "
            f'pattern: "{n}:{m}".'
        )
    return parse_pattern(str(value))


PatternText = Annotated[Pattern, BeforeValidator(read_pattern), PlainSerializer(str)]
"""A pattern as option models hold it."""


def proportional_counts(total: int, sizes: Sequence[int]) -> list[int]:
    """Split an integer over parts in proportion to their sizes.

    The cumulative share is rounded to the nearest integer (halves up), so the parts sum to
    `total` exactly, each is within one of its own share, and none exceeds its size.

    Raises:
        SecateurError: `total` is negative or does not fit in the parts.
    """
    whole = sum(sizes)
    if not 0 <= total <= whole:
        raise SecateurError(f"{total} zeros do not fit in {whole} weights; lower the sparsity")
    counts = []
    seen = given = 0
    for size in sizes:
        seen += size
        share = (2 * seen * total + whole) // (2 * whole) if whole else 0
        counts.append(share - given)
        given = share
    return counts


def uniform_zeros(pattern: Pattern, sizes: Sequence[int]) -> list[int]:
    """Zeros of linears of these sizes at the pattern's own sparsity, their total rounded once."""
    if isinstance(pattern, NM):
        return [size // pattern.m * (pattern.m - pattern.n) for size in sizes]
    return proportional_counts(round(pattern.sparsity * sum(sizes)), sizes)


@dataclass(frozen=True)
class Budget:
    """Exact demand on the mask of linears that are solved together, their rows stacked.

    Attributes:
        pattern: Kind of mask. The counts below bind, not an unstructured pattern's sparsity.
        rows: Rows of each stacked linear, in order.
        zeros: Exact number of zeros of each linear.
    """

    pattern: Pattern
    rows: tuple[int, ...]
    zeros: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.zeros) or min((*self.rows, *self.zeros), default=0) < 0:
            raise SecateurError(
                f"budget with rows {self.rows} and zeros {self.zeros}: "
                "give one count of zeros, not negative, for each linear"
            )

    @classmethod
    def uniform(cls, pattern: Pattern, rows: Sequence[int], width: int) -> Budget:
        """The pattern's own sparsity for linears of these rows and one width, rounded once."""
        check_width(pattern, width)
        zeros = uniform_zeros(pattern, [count * width for count in rows])
        return cls(pattern, tuple(rows), tuple(zeros))

    def check_fits(self, rows: int, width: int) -> None:
        """Raise SecateurError unless a (rows, width) matrix can meet the budget."""
        if sum(self.rows) != rows:
            raise SecateurError(f"a budget for {sum(self.rows)} rows was given {rows} rows")
        check_width(self.pattern, width)
        for count, zeros in zip(self.rows, self.zeros, strict=True):
            size = count * width
            if isinstance(self.pattern, NM):
                (exact,) = uniform_zeros(self.pattern, [size])
                if zeros != exact:
                    raise SecateurError(
                        f"pattern {self.pattern} puts {exact} zeros in a ({count}, {width}) "
                        f"linear, but the budget asks for {zeros}"
                    )
            elif zeros > size:
                raise SecateurError(f"{zeros} zeros do not fit in a ({count}, {width}) linear")


def check_width(pattern: Pattern, width: int) -> None:
    """Raise SecateurError if rows of `width` columns cannot be cut into the pattern's groups."""
    if isinstance(pattern, NM) and width % pattern.m:
        raise SecateurError(
            f"pattern {pattern} needs a width divisible by {pattern.m}, but the width is {width}; "
            "choose another pattern or leave this linear dense"
        )


def select(
    score_OI: Tensor, budget: Budget, scope: Scope = "row", row_zeros: Sequence[int] | None = None
) -> Tensor:
    """Keep the weights with the highest scores, exactly within budget; mask_OI, True = kept.

    Among equal scores the one with the lower position goes first, so a mask depends neither on
    the device nor on how linears are stacked.

    Args:
        score_OI: Scores of stacked linears, floating point; +inf is never pruned if avoidable.
        budget: Rows and zeros of each linear.
        scope: Where unstructured weights compete: within each "row" (zeros of rows differ by at
            most one) or over the whole "linear". n:m weights always compete in their group.
        row_zeros: Zeros of each row, where rows are to differ; within the budget.

    Raises:
        SecateurError: A score is NaN, or the budget does not fit the shape.
    """
    budget.check_fits(*score_OI.shape)
    refuse_nan(score_OI)
    pattern = budget.pattern
    if isinstance(pattern, NM):
        groups = score_OI.unflatten(1, (-1, pattern.m))
        return keep_highest(groups, pattern.n, dim=2).flatten(1)
    if row_zeros is not None:
        return ~lowest(score_OI, row_zeros)
    mask_OI = torch.empty_like(score_OI, dtype=torch.bool)
    parts = zip(score_OI.split(budget.rows), mask_OI.split(budget.rows), budget.zeros, strict=True)
    for score, mask, zeros in parts:
        if scope == "linear":
            mask.copy_(~lowest(score.reshape(1, -1), [zeros]).view(mask.shape))
        else:
            steps = [row * zeros // len(score) for row in range(len(score) + 1)]
            counts = [after - before for before, after in itertools.pairwise(steps)]
            mask.copy_(~lowest(score, counts))
    return mask_OI


def refuse_nan(score: Tensor) -> None:
    """Raise SecateurError if a score is NaN."""
    if score.numel() and bool(score.amin().isnan()):
        raise SecateurError(
            "a pruning score is NaN; check the weights and the calibration statistics for NaN"
        )


def keep_highest(score: Tensor, n: int, dim: int) -> Tensor:
    """Mark the n highest scores along a dimension; of equal scores the later ones.

    Args:
        score: Any shape, no NaN.
        n: How many to mark.
        dim: The dimension that holds a group.

    Returns:
        bool tensor of the same shape.
    """
    m = score.shape[dim]
    if m in _LANES and dim % score.ndim == score.ndim - 1 and sys.byteorder == "little":
        mask = torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
        size = _CACHED if score.device.type == "cpu" else max(score.numel(), 1)
        parts = zip(score.reshape(-1).split(size), mask.view(-1).split(size), strict=True)
        for score_N, mask_N in parts:
            _keep_highest_in_lanes(score_N, n, m, mask_N)
        return mask
    if m > _PAIRWISE_GROUP:
        order = score.argsort(dim=dim, stable=True)
        return torch.ones_like(score, dtype=torch.bool).scatter_(
            dim, order.narrow(dim, 0, m - n), False
        )
    # Members of a group may lie next to each other; comparisons run along contiguous memory.
    members = [score.select(dim, index).contiguous() for index in range(m)]
    better = [torch.zeros_like(member, dtype=torch.uint8) for member in members]
    for earlier, later in itertools.combinations(range(m), 2):
        # A tie goes to the later one.
        wins = members[earlier] > members[later]
        better[later] += wins.view(torch.uint8)
        better[earlier] += (~wins).view(torch.uint8)
    return torch.stack([count < n for count in better], dim)


def _keep_highest_in_lanes(score_N: Tensor, n: int, m: int, mask_N: Tensor) -> None:
    """``keep_highest`` for groups of m that lie one behind another, into ``mask_N``.

    Every score is compared with the one d places behind it, for all d < m, so that comparisons run
    along contiguous memory. Read as one integer, the m results of a group then count, a byte for
    each member, how many others are better.
    """
    wins_N = torch.zeros_like(mask_N)
    wins_G, ones, every = wins_N.view(_LANES[m]), _bytes(m), 0
    better_G = mask_N.view(_LANES[m]).zero_()
    for distance in range(1, m):
        _greater(score_N[:-distance], score_N[distance:], wins_N[:-distance])
        # The others' partner lies in the next group.
        within = _bytes(m - distance)
        every += within
        # An earlier member's win counts for the later one; a loss, below, for itself.
        factor = (1 << 8 * distance) - 1
        better_G += torch.bitwise_and(wins_G, within).mul_(_wrapped(factor, m))
    # With 128 − n on top, the highest bit of a byte says whether n or more are better.
    better_G += _wrapped(every + (128 - n) * ones, m)
    better_G.bitwise_not_().bitwise_right_shift_(7).bitwise_and_(ones)


def _bytes(count: int) -> int:
    """The integer whose ``count`` lowest bytes are 1."""
    return int.from_bytes(b"\1" * count, "little")


def _wrapped(value: int, size: int) -> int:
    """The signed integer of ``size`` bytes with these bits."""
    bits = (value % (1 << 8 * size)).to_bytes(size, "little")
    return int.from_bytes(bits, "little", signed=True)


def _greater(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64):
        # numpy's vectorised comparison is many times faster than torch's.
        np.greater(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
    else:
        torch.gt(a, b, out=out)


def lowest(score_RN: Tensor, counts: Sequence[int]) -> Tensor:
    """Mark the `counts[r]` lowest scores of each row r; of equal scores the earlier ones.

    Args:
        score_RN: Scores without NaN.
        counts: One count for each row; it is fastest if they differ by one at most.

    Returns:
        bool tensor (R, N), True = among the lowest.
    """
    if not score_RN.numel() or max(counts) == 0:
        return torch.zeros_like(score_RN, dtype=torch.bool)
    count_R = torch.tensor(counts, device=score_RN.device)
    if max(counts) - min(counts) > 1:
        limit_R1 = _sorted(score_RN).gather(1, (count_R - 1).clamp_min(0)[:, None])
    else:
        limit_R1 = _order_statistics(score_RN, max(counts), count_R)
    lowest_RN = score_RN <= limit_R1
    if int(lowest_RN.count_nonzero()) == sum(counts):
        return lowest_RN
    # Ties at the limit: take only as many of them as are still missing, from the left.
    tied_R = lowest_RN.sum(1) != count_R
    score_TN, limit_T1, count_T1 = score_RN[tied_R], limit_R1[tied_R], count_R[tied_R, None]
    below_TN = score_TN < limit_T1
    equal_TN = score_TN == limit_T1
    missing_T1 = count_T1 - below_TN.sum(1, keepdim=True)
    lowest_RN[tied_R] = below_TN | (equal_TN & (equal_TN.cumsum(1) <= missing_T1))
    return lowest_RN


def _sorted(score_RN: Tensor) -> Tensor:
    if score_RN.device.type == "cpu":
        # numpy's vectorised sort is several times faster than torch's.
        return torch.from_numpy(np.sort(score_RN.numpy(), axis=1))
    return score_RN.sort(1).values


def _order_statistics(score_RN: Tensor, high: int, count_R: Tensor) -> Tensor:
    """The count_R-th smallest score of each row, counts being `high` or `high - 1`; (R, 1).

    A row whose count is 0 gets its smallest score.
    """
    if score_RN.device.type == "cpu":
        # numpy's vectorised partition is several times faster than torch's selection.
        split = torch.from_numpy(np.partition(score_RN.numpy(), high - 1, axis=1))
        high_R = split[:, high - 1]
        low_R = split[:, : high - 1].amax(1) if high > 1 else split.amin(1)
    else:
        high_R = score_RN.kthvalue(high, dim=1).values
        low_R = score_RN.kthvalue(max(high - 1, 1), dim=1).values
    return torch.where(count_R == high, high_R, low_R)[:, None]


def check_mask(mask_OI: Tensor, budget: Budget) -> None:
    """Raise SecateurError unless the mask meets its budget: each linear's count, each group."""
    budget.check_fits(*mask_OI.shape)
    if isinstance(budget.pattern, NM):
        groups = mask_OI.unflatten(1, (-1, budget.pattern.m))
        if bool((groups.sum(2) != budget.pattern.n).any()):
            raise SecateurError(f"a mask breaks its pattern {budget.pattern}")
    for mask, zeros in zip(mask_OI.split(budget.rows), budget.zeros, strict=True):
        found = mask.numel() - int(mask.count_nonzero())
        if found != zeros:
            raise SecateurError(f"a mask has {found} zeros, but its budget asks for {zeros}")
