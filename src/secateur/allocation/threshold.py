"""What allocations by a common threshold share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from secateur.allocation.allocation import BlockCounts
from secateur.allocation.histogram import BINS, rank_histogram, score_histogram
from secateur.allocation.profile import DenseBlock

Rows = Literal["even", "free"]
ROWS = (
    "even: each row of a linear will lose the same share, as with Wanda; free: the method divides "
    "a linear's zeros among its rows, as BESA and magnitude do"
)


def block_histograms(block: DenseBlock, rows: Rows) -> tuple[npt.NDArray[np.int32], list[bool]]:
    """Histograms of the scores of a block's linears, and which of them no token reached."""
    count = rank_histogram if rows == "even" else score_histogram
    scored = {name: count(score_OI) for name, score_OI in block.scores()}
    nothing = np.zeros(BINS, np.int32)
    names = [linear.name for linear in block.linears]
    return np.stack([scored.get(name, nothing) for name in names]), [
        name not in scored for name in names
    ]


def fixed_where_blind(
    counts: BlockCounts, blind: Sequence[bool], most: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Bounds of each linear's zeros; one without scores, such as an idle expert, has no choice."""
    low = [uniform if fixed else 0 for uniform, fixed in zip(counts.zeros, blind, strict=True)]
    high = [
        uniform if fixed else limit
        for uniform, limit, fixed in zip(counts.zeros, most, blind, strict=True)
    ]
    return low, high
