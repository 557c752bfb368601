"""Cycles of a simulated accelerator as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.deploy.accelerator import Formula, Memory
from secateur.deploy.simulation import Cycles, CycleSum, Simulation


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
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.title, table.title_justify = f"{formula.value} formula", "left"
    table.add_column("projection")
    for name in ("linears", "sparsity", "dense cycles", "pruned cycles", "speed-up"):
        table.add_column(name, justify="right")
    for projection in simulation.projections:
        table.add_row(*_cycles_row(projection, projection.cycles[formula], projection.linears))
    table.add_section()
    total = simulation.total
    table.add_row(*_cycles_row(total, total.cycles[formula], 1), style="bold")
    table.add_row()
    return table


def _cycles_row(summed: CycleSum, cycles: Cycles, divisor: int) -> Sequence[str]:
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
