"""``secateur ls``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class What(StrEnum):
    """Things that can be listed."""

    METHODS = "methods"
    PATTERNS = "patterns"
    ALLOCATIONS = "allocations"
    CALIBRATIONS = "calibrations"
    TASKS = "tasks"


def ls(
    what: Annotated[
        What, typer.Argument(help="methods, patterns, allocations, calibrations or tasks.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what can be chosen, a line each."""
    from rich.table import Table

    from secateur.cli.console import print_json, stdout

    rows = _rows(what)
    if as_json:
        print_json([{"name": name, "description": text} for name, text in rows])
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows:
        table.add_row(f"[bold]{name}[/]", text)
    stdout.print(table)


def _rows(what: What) -> list[tuple[str, str]]:
    match what:
        case What.METHODS:
            from secateur.methods import STAGES

            rows = [(name, _first_line(stage)) for name, stage in STAGES.items()]
            return [
                ("auto", "What lost least in trials: a plan, rates, masks, reconstruction."),
                *rows,
            ]
        case What.ALLOCATIONS:
            from secateur.allocation import ALLOCATIONS

            return [(name, _first_line(allocation)) for name, allocation in ALLOCATIONS.items()]
        case What.PATTERNS:
            return [
                ("0.5, 50%", "unstructured: that share of all weights, anywhere"),
                ("2:4", "keep 2 of every 4 consecutive input columns; sparse GPU units use it"),
                ("n:m", "keep n of every m consecutive input columns, any n and m"),
            ]
        case What.CALIBRATIONS:
            from secateur.text import SOURCES

            return list(SOURCES.items())
        case What.TASKS:
            from secateur.evaluation import TASKS

            return [(name, task.description) for name, task in TASKS.items()]


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").splitlines()[0]
