"""``secateur prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Dtype


def prune(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or .gguf file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the pruned checkpoint.")
    ],
    method: Annotated[
        str | None, typer.Option(help="magnitude, wanda, sparsegpt or admm. (default: wanda)")
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Fit kept weights anew. (default: with wanda)"),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights to remove. (default: 0.5)")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="n:m, keep n of every m input columns, such as 2:4.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="self, FILE.txt, FILE.jsonl, or a hub name. (default: self)"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows. (default: 128)")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512)")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random choices. (default: 0)")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin every window with the beginning-of-text token."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of forward passes. (default: auto)")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; other flags override its values.")
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write the recipe that these flags make, then go on.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over in the folder of an earlier run.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prune a model block by block and save a checkpoint that loads everywhere."""
    from secateur.checkpoint.files import write_text
    from secateur.cli.console import print_json, progress_bars, stderr, stdout
    from secateur.cli.options import recipe_from_flags
    from secateur.pruning import prune as run
    from secateur.report.terminal import report_table

    chosen = recipe_from_flags(
        recipe,
        method=method,
        refit=refit,
        sparsity=sparsity,
        pattern=pattern,
        calibration={
            "source": calibration,
            "samples": samples,
            "length": length,
            "seed": seed,
            "bos": bos,
        },
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
    stdout.print(report_table(result.report))
    for note in result.report.notes:
        stderr.print(f"[yellow]note[/] {note}")
    stdout.print(f"Saved to [bold]{output}[/]; every number is in {output / 'report.json'}.")
