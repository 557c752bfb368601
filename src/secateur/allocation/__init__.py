"""Rules that divide zeros among linears. One joins by its module and its name in the union."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from secateur.allocation.allocation import Allocation
from secateur.allocation.dlp import DLP
from secateur.allocation.loss import Loss
from secateur.allocation.owl import OWL
from secateur.allocation.plan import GivenPlan
from secateur.allocation.ramp import Ramp
from secateur.allocation.sensitivity import Sensitivity
from secateur.allocation.uniform import Uniform

_Allocations = Uniform | Ramp | OWL | DLP | Sensitivity | Loss | GivenPlan


def _named(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


AnyAllocation = Annotated[_Allocations, Field(discriminator="method"), BeforeValidator(_named)]

ALLOCATIONS: dict[str, type[Allocation]] = {
    allocation.model_fields["method"].default: allocation for allocation in get_args(_Allocations)
}

__all__ = ["ALLOCATIONS", "Allocation", "AnyAllocation", "Loss", "Uniform"]
