"""``secateur estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def estimate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or .gguf file.")],
    method: Annotated[str | None, typer.Option(help="As in prune.")] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="As in prune.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="As in prune.")] = None,
    pattern: Annotated[str | None, typer.Option(help="As in prune.")] = None,
    samples: Annotated[int | None, typer.Option(help="As in prune.")] = None,
    length: Annotated[int | None, typer.Option(help="As in prune.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe, as in prune.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell peak memory and work of a run before it starts."""
    from secateur.cli.console import print_json, stdout
    from secateur.cli.options import recipe_from_flags
    from secateur.estimation import estimate as run
    from secateur.report.terminal import estimate_table

    calibration: dict[str, Any] = {"samples": samples, "length": length}
    chosen = recipe_from_flags(
        recipe,
        method=method,
        refit=refit,
        sparsity=sparsity,
        pattern=pattern,
        calibration=calibration,
    )
    result = run(model, chosen, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        stdout.print(estimate_table(result))
