"""What a solver that chooses a mask returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseSolution:
    """Pruned weights of stacked linears.

    Attributes:
        w_OI: Weights, exactly zero outside the mask.
        mask_OI: bool, True = kept.
        damping: Fraction of the mean diagonal added to the Gram matrix.
        notes: Fallbacks that were needed, one sentence each.
    """

    w_OI: Tensor
    mask_OI: Tensor
    damping: float
    notes: tuple[str, ...] = ()
