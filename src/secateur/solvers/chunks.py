"""Rows of a matrix, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Weights handled at a time where 20 bytes each are needed: they stay in a core's cache, or keep
# an accelerator busy.
_CHUNK_CPU = 2**17
_CHUNK_ACCELERATOR = 2**22


def row_chunks(like_OI: Tensor, fewest: int = 1) -> Iterator[slice]:
    """Cut the rows of a matrix into pieces of a size that suits its device.

    Args:
        like_OI: The matrix.
        fewest: Rows that a piece has at least, the last one aside.
    """
    weights = _CHUNK_CPU if like_OI.device.type == "cpu" else _CHUNK_ACCELERATOR
    rows, columns = like_OI.shape
    step = max(fewest, weights // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))
