"""``secateur simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import TrustRemoteCode


def simulate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")],
    memory_traffic: Annotated[
        int | None,
        typer.Option(metavar="BITS", help="Charge loading too, of weights with so many bits."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count cycles, dense and pruned, on an accelerator that skips zeros."""
    from secateur.cli.console import print_json, stdout
    from secateur.deploy.accelerator import Accelerator, Memory
    from secateur.deploy.simulation import simulate as run
    from secateur.deploy.table import simulation_table

    memory = None if memory_traffic is None else Memory(weight_bits=memory_traffic)
    simulation = run(folder, Accelerator(memory=memory), trust_remote_code=trust_remote_code)
    if as_json:
        print_json(simulation.model_dump(mode="json"))
    else:
        stdout.print(simulation_table(simulation))
