"""Cycles of a sparse linear on an accelerator of the ViTCoD type.

The accelerator (You et al. 2023, arXiv 2210.09573) is an array of multipliers. BESA (Xu et al.
2024, arXiv 2402.16880) gives it one linear and one token: columns that keep more than a share of
their weights are moved to the front and multiplied whole, zeros included, by some columns of the
array, while the others go through the scattered weights of the rest. Both work at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from secateur.runs.errors import SecateurError

# The share a column must keep to be whole moves until the whole columns hold about half of all
# kept weights; five shares are tried, and the best one counts.
_FIRST_SHARE = 0.5
_STEP = 0.1
_TRIES = 5
_BALANCED = (0.4, 0.6)


class Formula(StrEnum):
    """How the work on one linear is counted.

    ``corrected``: a whole column costs as many products as it has rows, and an array column at
    least works on whole columns if there are any.

    ``released``: as the program released with BESA counts. A whole column costs as many products
    as the linear has *columns*. Whole columns that would get less than one column of the array
    are free. A linear wider than tall is cut into square patches, one after the other.
    """

    CORRECTED = "corrected"
    RELEASED = "released"


@dataclass(frozen=True)
class Memory:
    """Weights are loaded from memory while the array computes; the slower of the two counts.

    A scattered weight needs its place as well: a bitmap or a list of row numbers per column,
    whichever is smaller.

    Attributes:
        weight_bits: bits of one weight.
        bandwidth: bytes per second.
        clock: cycles of the array per second.
    """

    weight_bits: int = 8
    bandwidth: float = 76.8e9
    clock: float = 500e6

    def __post_init__(self) -> None:
        if self.weight_bits < 1:
            raise SecateurError(
                f"{self.weight_bits} bits per weight hold nothing; give 1 or more, such as 8."
            )


@dataclass(frozen=True)
class Accelerator:
    """An array of multipliers, each of which does one product per cycle.

    Attributes:
        width: columns of the array, which are divided between whole columns and scattered weights.
        height: multipliers in a column.
        memory: where weights come from; None if loading them costs nothing.
    """

    width: int = 64
    height: int = 64
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if self.width < 2 or self.height < 1:
            raise SecateurError(
                f"an array of {self.width} x {self.height} multipliers cannot be divided; "
                "give a width of 2 or more and a height of 1 or more."
            )


@dataclass(frozen=True)
class _Reordered:
    """A linear whose whole columns were moved to the front."""

    rows: int
    columns: int
    whole: int
    scattered: int


def pruned_cycles(kept_I: Tensor, rows: int, formula: Formula, accelerator: Accelerator) -> int:
    """Cycles of one linear and one token.

    Args:
        kept_I: Kept weights of each column, integers from 0 to ``rows``.
        rows: Outputs of the linear.
        formula: How work is counted.
        accelerator: What does it.

    Returns:
        Whole cycles; 0 if nothing is kept.
    """
    patches = kept_I.split(rows) if formula is Formula.RELEASED else (kept_I,)
    return sum(_fewest_cycles(patch_I, rows, formula, accelerator) for patch_I in patches)


def dense_cycles(rows: int, columns: int, formula: Formula, accelerator: Accelerator) -> int:
    """Cycles of a linear that keeps all weights."""
    return pruned_cycles(torch.full((columns,), rows), rows, formula, accelerator)


def _fewest_cycles(kept_I: Tensor, rows: int, formula: Formula, accelerator: Accelerator) -> int:
    kept = int(kept_I.sum())
    if kept == 0:
        return 0
    tried = []
    share = _FIRST_SHARE
    for _ in range(_TRIES):
        whole_I = kept_I > share * rows
        in_whole = int(kept_I[whole_I].sum())
        linear = _Reordered(rows, len(kept_I), int(whole_I.sum()), kept - in_whole)
        tried.append(_cycles(linear, formula, accelerator))
        lowest, highest = _BALANCED
        if lowest < in_whole / kept < highest:
            break
        share += _STEP if in_whole / kept >= highest else -_STEP
    return min(tried)


def _cycles(linear: _Reordered, formula: Formula, accelerator: Accelerator) -> int:
    computing = _array_cycles(linear, formula, accelerator)
    if accelerator.memory is None:
        return computing
    return max(computing, _loading_cycles(linear, accelerator.memory))


def _array_cycles(linear: _Reordered, formula: Formula, accelerator: Accelerator) -> int:
    """Cycles of the busier part of the array."""
    products = linear.rows * linear.whole
    width = accelerator.width * products // (products + linear.scattered)
    if formula is Formula.RELEASED:
        products = linear.columns * linear.whole
    elif linear.whole:
        width = max(width, 1)
    # Rounded down, the width is zero or leaves a column to scattered weights, if there are any.
    whole = _ceil(products, width * accelerator.height) if width else 0
    rest = accelerator.width - width
    return max(whole, _ceil(linear.scattered, rest * accelerator.height) if rest else 0)


def _loading_cycles(linear: _Reordered, memory: Memory) -> int:
    behind = linear.columns - linear.whole
    bitmap = linear.rows * behind
    row_numbers = linear.scattered * (linear.rows - 1).bit_length()
    counts = behind * linear.rows.bit_length()
    weights = linear.rows * linear.whole + linear.scattered
    bits = weights * memory.weight_bits + min(bitmap, row_numbers + counts)
    return _ceil(bits * memory.clock, 8 * memory.bandwidth)


def _ceil(work: float, rate: float) -> int:
    return int(-(-work // rate))
