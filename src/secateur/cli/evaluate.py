"""``secateur eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Dtype


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or .gguf file.")],
    text: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A hub data set: wikitext2, or NAME:CONFIG:SPLIT.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks, by commas; `secateur ls tasks`.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of TASK_SPLIT.jsonl files. (default: the hub)")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N questions of each task.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model: its figures, KL divergence and top-1 agreement."),
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin every window with the beginning-of-text token.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of matrix products.")] = Dtype.AUTO,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity, zero-shot accuracy, and the distance from the dense model."""
    from secateur.cli.console import print_json, progress_bars, stdout
    from secateur.evaluation import evaluate as run
    from secateur.report.terminal import evaluation_table

    with progress_bars() as progress:
        result = run(
            model,
            text=text,
            dataset=dataset,
            window=window,
            max_windows=max_windows,
            tasks=[name.strip() for name in tasks.split(",")] if tasks else (),
            task_data=task_data,
            limit=limit,
            against=against,
            bos=bos,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        stdout.print(evaluation_table(result))
