"""The stages that ``auto`` stands for."""

from __future__ import annotations

from secateur.methods import AnyStage
from secateur.methods.admm import ADMM
from secateur.methods.besa_rates import BESARates
from secateur.methods.reconstruct import Reconstruct
from secateur.pattern import NM, Pattern


def automatic_stages(pattern: Pattern) -> tuple[AnyStage, ...]:
    """The recipe that lost least for its time in the benchmark of block methods.

    Rates of rows first, where the pattern lets them differ; then mask and weights within each
    row's rate; then the block as a whole.
    """
    if isinstance(pattern, NM):
        return (ADMM(), Reconstruct())
    return (BESARates(), ADMM(), Reconstruct())
