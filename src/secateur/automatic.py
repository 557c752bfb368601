"""The stages that ``auto`` stands for."""

from __future__ import annotations

from secateur.methods import AnyStage
from secateur.methods.admm import ADMM
from secateur.methods.besa_rates import BESARates
from secateur.methods.reconstruct import Reconstruct
from secateur.pattern import NM, Pattern


def automatic_stages(pattern: Pattern) -> tuple[AnyStage, ...]:
    """The best recipe per minute that has been measured for a kind of pattern.

    The table behind the choice is that of block methods in the documentation's benchmarks.
    """
    if isinstance(pattern, NM):
        # Rows must keep the same number of weights: there is nothing to allocate.
        return (ADMM(), Reconstruct())
    return (BESARates(), ADMM(), Reconstruct())
