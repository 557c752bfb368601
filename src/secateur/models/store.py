"""What the block walk asks of a model, wherever its weights live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import QuantizedSolution

# Of a large tensor so many numbers are looked at at once.
_PART = 1 << 24


class BlockStore(Protocol):
    """Gives out blocks one at a time and takes the finished ones back.

    A block is given out with fp32 weights on the device of the walk.
    """

    blocks: BlockList

    def embeddings(self) -> AbstractContextManager[None]:
        """Within the context, everything before the blocks can run."""

    def head(self) -> AbstractContextManager[None]:
        """Within the context, everything outside the blocks can run, the output head included."""

    def load(self, index: int) -> nn.Module:
        """Return a block with its dense weights; they are known to be finite."""

    def load_finished(self, index: int) -> nn.Module:
        """Return a block that was saved before, bit-equal to what was saved."""

    def weight_dtype(self, index: int) -> torch.dtype:
        """Return the dtype a block's linears are saved in, the least precise if they differ."""

    def save(
        self,
        index: int,
        masks: Mapping[str, Tensor] | None,
        quantised: Mapping[str, QuantizedSolution] | None = None,
    ) -> None:
        """Write a loaded block, whose weights are rounded to their dtype, and its masks if any.

        Quantised weights, by linear name, are for formats that hold their levels.
        """

    def written(self, index: int) -> list[Path]:
        """Return the files that a saved block is in."""

    def release(self, index: int) -> None:
        """Forget a loaded block's weights where they need not stay."""

    def finish(self) -> None:
        """Write what makes the blocks a checkpoint that loads."""


def least_precise(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating dtype with the largest relative rounding step."""
    return max(
        (dtype for dtype in dtypes if dtype.is_floating_point),
        key=lambda dtype: torch.finfo(dtype).eps,
    )


def check_finite(tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise SecateurError naming the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all(
            bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_PART)
        ):
            raise SecateurError(
                f"The weights {prefix}{name} contain NaN or infinite values; "
                "fetch or export the model again."
            )
