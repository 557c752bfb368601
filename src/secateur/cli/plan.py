"""``secateur plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    Allocate,
    Bos,
    Calibration,
    Device,
    ForwardDtype,
    Length,
    Model,
    PatternText,
    RecipeFile,
    Samples,
    Seed,
    Sparsity,
    TrustRemoteCode,
    recipe_from_flags,
)


def plan(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan.json to write.")],
    sparsity: Sparsity = None,
    pattern: PatternText = None,
    allocate: Allocate = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    bos: Bos = None,
    device: Device = None,
    dtype: ForwardDtype = None,
    recipe: RecipeFile = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Divide the zeros among the linears of a model, without pruning it."""
    from secateur.cli.console import progress_bars, stdout
    from secateur.pruning.prune import plan as run
    from secateur.report.terminal import plan_table

    chosen = recipe_from_flags(
        recipe,
        sparsity=sparsity,
        pattern=pattern,
        allocate=allocate,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        bos=bos,
        device=device,
        dtype=None if dtype is None else dtype.value,
    )
    with progress_bars() as progress:
        result = run(model, chosen, trust_remote_code=trust_remote_code, progress=progress)
    result.write(output)
    if as_json:
        print(result.to_json(), end="")
        return
    stdout.print(plan_table(result))
    stdout.print(f"Written to [bold]{output}[/]; secateur prune --plan {output} follows it.")
