"""``secateur inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the zeros of every linear, from the files alone."""
    from secateur.cli.console import print_json, stdout
    from secateur.models.inspection import inspect as count
    from secateur.report.terminal import inspection_table

    inspection = count(folder, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(inspection.model_dump(mode="json"))
    else:
        stdout.print(inspection_table(inspection))
