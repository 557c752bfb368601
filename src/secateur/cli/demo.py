"""``secateur demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pruned checkpoint.")
    ] = Path("runs/demo"),
) -> None:
    """Prune a small model to one half, evaluate it, and show what it cost."""
    from secateur.cli.console import progress_bars, stdout
    from secateur.demo import run_demo
    from secateur.report.terminal import evaluation_table, report_table

    with progress_bars() as progress:
        result = run_demo(output, progress)
    stdout.print(report_table(result.pruned.report))
    stdout.print(evaluation_table(result.evaluation))
    stdout.print(f"\nSaved to [bold]{output}[/]; every number is in {output / 'report.json'}.")
    stdout.print(f"To look at: [bold]{result.page}[/]", soft_wrap=True)
    stdout.print(
        f"Dense model: {result.source}\nYour own: secateur prune MODEL --output DIR --sparsity 0.5",
        style="dim",
        soft_wrap=True,
    )
