"""What a pruned checkpoint would cost on an accelerator that skips zeros, and a table of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, computed_field
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from secateur.deploy.accelerator import (
    Accelerator,
    Formula,
    Memory,
    dense_cycles,
    pruned_cycles,
)
from secateur.models.checkpoint import Checkpoint
from secateur.models.inspection import stored_linears
from secateur.report.terminal import add_row, new_table

# Rows whose nonzeros are counted in one byte per column.
_ROWS = 255
# Everything up to the number of the block.
_BLOCK = re.compile(r"^.*?\.\d+\.")
# The number of an expert, which does not make another projection.
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Cycles(BaseModel):
    """Cycles with all weights kept, and with the zeros skipped."""

    dense: int
    pruned: int

    @computed_field
    def speed_up(self) -> float | None:
        """Dense over pruned cycles; None if nothing is left to compute."""
        return self.dense / self.pruned if self.pruned else None


class LinearCycles(BaseModel):
    """One linear and one token."""

    name: str
    projection: str
    rows: int
    columns: int
    zeros: int
    cycles: dict[Formula, Cycles]


class CycleSum(BaseModel):
    """Several linears, their cycles added."""

    name: str
    linears: int
    weights: int
    zeros: int
    cycles: dict[Formula, Cycles]


class Simulation(BaseModel):
    """Cycles of all linears inside the blocks of a checkpoint."""

    folder: str
    accelerator: Accelerator
    linears: list[LinearCycles]
    projections: list[CycleSum]
    total: CycleSum


def simulate(
    folder: Path, accelerator: Accelerator | None = None, *, trust_remote_code: bool = False
) -> Simulation:
    """Count the nonzeros of every linear in the files, and the cycles they would take.

    One tensor at a time is in memory. A projection is the same linear of all blocks.

    Raises:
        SecateurError: the folder is no readable checkpoint of a causal language model.
    """
    accelerator = accelerator or Accelerator()
    found = Checkpoint.at(folder, trust_remote_code=trust_remote_code, use="read")
    linears = [
        linear
        for name, weight in stored_linears(found)
        for linear in _simulated(name.removesuffix(".weight"), weight, accelerator)
    ]
    projections: dict[str, list[LinearCycles]] = {}
    for linear in linears:
        projections.setdefault(linear.projection, []).append(linear)
    return Simulation(
        folder=str(folder),
        accelerator=accelerator,
        linears=linears,
        projections=[_sum(name, members) for name, members in projections.items()],
        total=_sum("all", linears),
    )


def kept_per_column(weight_OI: Tensor) -> Tensor:
    """Count the weights of each column that are not zero.

    Args:
        weight_OI: Weights of any dtype.

    Returns:
        kept_I: int64.
    """
    if weight_OI.dtype is torch.float16:
        # The same bits are zero in both formats, and testing bfloat16 is several times faster.
        weight_OI = weight_OI.view(torch.bfloat16)
    kept_I = torch.zeros(weight_OI.shape[1], dtype=torch.int64)
    for part_OI in weight_OI.split(_ROWS):
        kept_I += part_OI.bool().view(torch.uint8).sum(0, dtype=torch.uint8)
    return kept_I


def _simulated(name: str, weight: Tensor, accelerator: Accelerator) -> Iterator[LinearCycles]:
    if weight.ndim == 2:
        yield _linear(name, weight, accelerator)
        return
    for expert, weight_OI in enumerate(weight):
        yield _linear(f"{name}.{expert}", weight_OI, accelerator)


def _linear(name: str, weight_OI: Tensor, accelerator: Accelerator) -> LinearCycles:
    rows, columns = weight_OI.shape
    kept_I = kept_per_column(weight_OI)
    return LinearCycles(
        name=name,
        projection=_EXPERT.sub("*", _BLOCK.sub("", name)),
        rows=rows,
        columns=columns,
        zeros=rows * columns - int(kept_I.sum()),
        cycles={
            formula: Cycles(
                dense=dense_cycles(rows, columns, formula, accelerator),
                pruned=pruned_cycles(kept_I, rows, formula, accelerator),
            )
            for formula in Formula
        },
    )


def _sum(name: str, linears: Sequence[LinearCycles]) -> CycleSum:
    return CycleSum(
        name=name,
        linears=len(linears),
        weights=sum(linear.rows * linear.columns for linear in linears),
        zeros=sum(linear.zeros for linear in linears),
        cycles={
            formula: Cycles(
                dense=sum(linear.cycles[formula].dense for linear in linears),
                pruned=sum(linear.cycles[formula].pruned for linear in linears),
            )
            for formula in Formula
        },
    )


def simulation_table(simulation: Simulation) -> RenderableType:
    """Cycles of every projection, then all together, by each formula."""
    array = simulation.accelerator
    line = (
        f"one token, {array.width} x {array.height} multipliers, {_traffic_text(array.memory)}\n"
        "projections: mean cycles of a linear; all: the sum of all linears"
    )
    tables = (_cycles_table(simulation, formula) for formula in Formula)
    return Group(*tables, Text(line, style="dim"))


def _cycles_table(simulation: Simulation, formula: Formula) -> RenderableType:
    names = ("linears", "sparsity", "dense cycles", "pruned cycles", "speed-up")
    table = new_table("projection", *names, title=f"{formula.value} formula")
    for projection in simulation.projections:
        add_row(table, *_cycles_row(projection, formula, projection.linears))
    table.add_section()
    add_row(table, *_cycles_row(simulation.total, formula, 1), style="bold")
    table.add_row()
    return table


def _cycles_row(summed: CycleSum, formula: Formula, divisor: int) -> tuple[str, ...]:
    cycles = summed.cycles[formula]
    return (
        summed.name,
        str(summed.linears),
        f"{summed.zeros / summed.weights:.4f}",
        f"{cycles.dense / divisor:,.0f}",
        f"{cycles.pruned / divisor:,.0f}",
        "" if cycles.speed_up is None else f"{cycles.speed_up:.2f}",
    )


def _traffic_text(memory: Memory | None) -> str:
    if memory is None:
        return "no memory traffic"
    return (
        f"weights of {memory.weight_bits} bits loaded at {memory.bandwidth / 1e9:.1f} GB/s "
        f"and {memory.clock / 1e6:.0f} MHz"
    )
