"""``secateur train``."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    Device,
    ForwardDtype,
    LogTo,
    Model,
    MoreOptions,
    ReportAsJson,
    Restart,
    Seed,
    TrustRemoteCode,
    given,
)


def train(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the trained checkpoint.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text file, folder of them, or hub data set; repeatable; NAME:WEIGHT for a mix."
        ),
    ],
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="n:m such as 2:4, or a sparsity. (default: 2:4)")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="default, from a one-shot mask; ast, the paper's recipe; keep-mask, for a pruned "
            "checkpoint."
        ),
    ] = "default",
    validation: Annotated[
        str | None,
        typer.Option(help="Text to validate with. (default: windows of the data, held out)"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model to learn from. (default: MODEL, if dense)")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest. (default: the preset's)")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per step. (default: the preset's)")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window. (default: 1024)")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Ask the teacher once, before training, for so many likeliest tokens. "
            "(default: the preset's)"
        ),
    ] = None,
    low_rank: Annotated[
        int | None,
        typer.Option(help="Add dense low-rank products, one rank per so many columns."),
    ] = None,
    log_to: LogTo = None,
    seed: Seed = None,
    options: MoreOptions = None,
    device: Device = None,
    dtype: ForwardDtype = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: ReportAsJson = False,
) -> None:
    """Train a model to a pattern, with masks that adapt and the dense model as teacher."""
    from secateur.cli.console import print_json, progress_bars, show_result
    from secateur.report.terminal import training_table
    from secateur.runs.options import put_over, read_mapping
    from secateur.runs.progress import silent
    from secateur.training import Training
    from secateur.training import train as run

    flags: dict[str, Any] = {
        "tokens": tokens,
        "pattern": pattern,
        "batch_tokens": batch_tokens,
        "length": length,
        "log_to": None if log_to is None else log_to.value,
        "seed": seed,
        "device": device,
        "dtype": None if dtype is None else dtype.value,
        "optimiser": given({"learning_rate": learning_rate}) or None,
        "distillation": given({"top_k": top_k}) or None,
        "low_rank": given({"group": low_rank}) or None,
    }
    values = put_over(read_mapping(options, Training.noun) if options else {}, given(flags))
    # Of the processes that torchrun started, one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    with progress_bars() if speaks else nullcontext(silent) as progress:
        result = run(
            model,
            Training.from_mapping(values, preset),
            output,
            data=data,
            validation=validation,
            teacher=teacher,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not speaks:
        return
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(training_table(result.report), result.report.notes, output)
