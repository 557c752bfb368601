"""Where the commands print, and how long work shows that it is alive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secateur.runs.progress import Progress as Callback

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


@contextmanager
def progress_bars() -> Iterator[Callback]:
    """Show one bar per phase on stderr, with elapsed and remaining time."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


def show_result(table: RenderableType, notes: Iterable[str], output: Path) -> None:
    """Show a finished run: its table, what the user should know, and where the files are."""
    stdout.print(table)
    for note in notes:
        stderr.print(f"[yellow]note[/] {note}")
    stdout.print(f"Saved to [bold]{output}[/]; every number is in {output / 'report.json'}.")
    stdout.print(f"To look at: {output / 'secateur' / 'report.html'}", soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON to stdout, unstyled and unwrapped."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
