"""``secateur compare``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer


def compare(
    file: Annotated[
        Path, typer.Argument(help="YAML: model, calibration, evaluation and rows of recipes.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the rows and the table.")
    ],
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the pruned checkpoints once they are evaluated.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prune one model by several recipes, evaluate them alike, and write one table."""
    from secateur.cli.console import print_json, progress_bars, stdout
    from secateur.comparison import compare as run
    from secateur.comparison.table import comparison_table

    # As an exception, so that the process of the running row goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with progress_bars() as progress:
        result = run(file, output, keep=keep, progress=progress)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    stdout.print(comparison_table(result))
    stdout.print(f"Saved to [bold]{output / 'comparison.md'}[/] and comparison.json.")
