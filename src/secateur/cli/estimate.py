"""``secateur estimate``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import (
    Allocate,
    Asymmetric,
    Format,
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
    Samples,
    Sparsity,
    TrustRemoteCode,
    recipe_from_flags,
)


def estimate(
    model: Model,
    method: Method = None,
    rebuild: RebuildMasks = None,
    refit: Refit = None,
    reconstruct: Reconstruct = None,
    permute: Permute = None,
    quantize: Quantize = None,
    quantize_group: QuantizeGroup = None,
    asymmetric: Asymmetric = None,
    quantized_format: Format = None,
    sparsity: Sparsity = None,
    pattern: PatternText = None,
    allocate: Allocate = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeFile = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell peak memory and work of a run before it starts."""
    from secateur.cli.console import print_json, stdout
    from secateur.pruning.estimate import estimate as run
    from secateur.report.terminal import estimate_table

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
        sparsity=sparsity,
        pattern=pattern,
        allocate=allocate,
        samples=samples,
        length=length,
    )
    result = run(model, chosen, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        stdout.print(estimate_table(result))
