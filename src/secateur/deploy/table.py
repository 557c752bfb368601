"""Cycles of a simulated accelerator as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from secateur.deploy.accelerator import Formula, Memory
from secateur.deploy.simulation import CycleSum, Simulation
from secateur.report.terminal import add_row, new_table


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
