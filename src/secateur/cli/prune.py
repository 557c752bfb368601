"""``secateur prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    Allocate,
    Asymmetric,
    Bos,
    Calibration,
    Device,
    Format,
    ForwardDtype,
    Length,
    Method,
    Model,
    PatternText,
    Permute,
    Quantize,
    QuantizeGroup,
    RebuildMasks,
    RecipeFile,
    Reconstruct,
    Refit,
    ReportAsJson,
    Restart,
    Samples,
    Seed,
    Sparsity,
    TrainScales,
    TrustRemoteCode,
    recipe_from_flags,
)


def prune(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the pruned checkpoint.")
    ],
    method: Method = None,
    rebuild: RebuildMasks = None,
    refit: Refit = None,
    reconstruct: Reconstruct = None,
    permute: Permute = None,
    quantize: Quantize = None,
    quantize_group: QuantizeGroup = None,
    asymmetric: Asymmetric = None,
    quantized_format: Format = None,
    train_scales: TrainScales = None,
    sparsity: Sparsity = None,
    pattern: PatternText = None,
    allocate: Allocate = None,
    plan: Annotated[
        Path | None, typer.Option(help="plan.json that says how many zeros each linear gets.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    bos: Bos = None,
    device: Device = None,
    dtype: ForwardDtype = None,
    recipe: RecipeFile = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write the recipe that these flags make, then go on.")
    ] = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: ReportAsJson = False,
) -> None:
    """Prune a model block by block and save a checkpoint that loads everywhere."""
    from secateur.cli.console import print_json, progress_bars, show_result
    from secateur.pruning.prune import prune as run
    from secateur.report.terminal import report_table
    from secateur.runs.files import write_text

    chosen = recipe_from_flags(
        recipe,
        method=method,
        rebuild=rebuild,
        refit=refit,
        reconstruct=reconstruct,
        permute=permute,
        quantize=quantize,
        quantize_group=quantize_group,
        asymmetric=asymmetric,
        quantized_format=quantized_format,
        train_scales=train_scales,
        sparsity=sparsity,
        pattern=pattern,
        allocate=allocate,
        plan=plan,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        bos=bos,
        device=device,
        dtype=None if dtype is None else dtype.value,
    )
    if save_recipe is not None:
        write_text(save_recipe, chosen.to_yaml())
    with progress_bars() as progress:
        result = run(
            model,
            chosen,
            output,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(report_table(result.report), result.report.notes, output)
