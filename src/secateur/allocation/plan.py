"""Plan: the file that another allocation or a person wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from secateur.allocation.allocation import Allocation, DensePasses
from secateur.models.experts import linear_shapes
from secateur.models.structure import BlockList
from secateur.patterns.pattern import Pattern
from secateur.patterns.plan import Plan
from secateur.runs.errors import SecateurError


class GivenPlan(Allocation):
    """The zeros that a plan file gives to each linear."""

    method: Literal["plan"] = "plan"
    file: Path = Field(description="the plan.json to follow")

    def prepare(self, blocks: BlockList, pattern: Pattern) -> Plan:
        plan = Plan.from_file(self.file)
        if plan.pattern != pattern:
            raise SecateurError(
                f"{self.file} is a plan for pattern {plan.pattern} and the run asks for {pattern}; "
                "give the plan's pattern, or write a plan for the other one."
            )
        plan.check_fits(linear_shapes(blocks))
        return plan

    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        return plan
