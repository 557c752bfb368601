"""Block methods. A method joins by its module and one name in ``AnyStage``."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from secateur.methods.admm import ADMM
from secateur.methods.barber import Barber
from secateur.methods.besa import BESA
from secateur.methods.besa_rates import BESARates
from secateur.methods.besa_reconstruct import BESAReconstruct
from secateur.methods.keep import Keep
from secateur.methods.magnitude import Magnitude
from secateur.methods.permute import Permute
from secateur.methods.quantize import Quantize
from secateur.methods.reconstruct import Reconstruct
from secateur.methods.refit import Refit
from secateur.methods.scales import Scales
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.stage import BlockStage, DenseStage, GroupStage, Stage
from secateur.methods.swaps import Swaps
from secateur.methods.wanda import Wanda

AnyStage = Annotated[
    Permute
    | Keep
    | Magnitude
    | Wanda
    | SparseGPT
    | ADMM
    | Refit
    | BESA
    | BESARates
    | BESAReconstruct
    | Barber
    | Swaps
    | Reconstruct
    | Quantize
    | Scales,
    Field(discriminator="method"),
]

STAGES: dict[str, type[Stage]] = {
    stage.model_fields["method"].default: stage for stage in get_args(get_args(AnyStage)[0])
}

__all__ = ["STAGES", "AnyStage", "BlockStage", "DenseStage", "GroupStage", "Stage"]
