"""``secateur targets``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.flags import AsJson, with_flags


@with_flags(given={"--threads": "bench.threads"})
def targets(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR...]", help="folders of runs that `secateur bench` measured"),
    ] = None,
    *,
    given: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Measure what pays in the runtimes of this machine: zeros, 2:4, smaller shapes, fewer bits."""
    from secateur.cli.console import print_json, progress_bars, stdout
    from secateur.deploy.targets import targets as run
    from secateur.deploy.targets import targets_table

    with progress_bars() as progress:
        found = run(runs or [], progress=progress, **given)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        stdout.print(targets_table(found))
