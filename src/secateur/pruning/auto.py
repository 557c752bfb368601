"""What ``auto`` stands for."""

from __future__ import annotations

from secateur.allocation import AnyAllocation, Loss, Uniform
from secateur.methods import AnyStage
from secateur.methods.admm import ADMM
from secateur.methods.besa_rates import BESARates
from secateur.methods.reconstruct import Reconstruct
from secateur.patterns.pattern import NM, Pattern


def automatic_stages(pattern: Pattern) -> tuple[AnyStage, ...]:
    """The stages that lost least for their time in the benchmark of block methods.

    Rates of rows first, where the pattern lets them differ; then mask and weights within each
    row's rate; then the block as a whole.
    """
    if isinstance(pattern, NM):
        return (ADMM(), Reconstruct())
    return (BESARates(), ADMM(), Reconstruct())


def automatic_allocation(pattern: Pattern) -> AnyAllocation:
    """How zeros are divided between the blocks: by their effect on the final loss, where it may.

    The stages divide a block's zeros again, so that only the totals of the blocks count.
    """
    loss = Loss()
    if isinstance(pattern, NM) or not 0 < pattern.sparsity <= loss.max_sparsity:
        return Uniform()
    return loss
