"""Uniform allocation."""

from __future__ import annotations

from typing import Literal

from secateur.allocation.allocation import Allocation, DensePasses
from secateur.models.structure import BlockList
from secateur.patterns.plan import Plan


class Uniform(Allocation):
    """The same sparsity in every linear."""

    method: Literal["uniform"] = "uniform"

    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        return plan
