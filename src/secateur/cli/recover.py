"""``secateur recover``."""

from __future__ import annotations

from enum import StrEnum
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


class Network(StrEnum):
    """What is trained of the whole network."""

    LORA = "lora"
    FULL = "full"
    NONE = "none"


def recover(
    model: Model,
    teacher: Annotated[str, typer.Option(help="The dense model that MODEL was cut from.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the recovered checkpoint.")
    ],
    data: Annotated[
        list[str], typer.Option(help="Text file, folder of them, or hub data set; repeatable.")
    ],
    network: Annotated[
        Network | None,
        typer.Option(help="Train low-rank adapters, all parameters, or nothing. (default: lora)"),
    ] = None,
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks/--no-blocks", help="Fit each block to the dense hidden states first."
        ),
    ] = True,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train the network on. (default: 262144)")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapters. (default: 32)")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="At its highest. (default: 1e-3 for lora, 1e-4 for full)"),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per step. (default: 4096)")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512)")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Likeliest tokens of the teacher to keep. (default: 64)")
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
    """Teach a cut model what the dense one knew."""
    from secateur.cli.console import print_json, progress_bars, show_result
    from secateur.report.terminal import recovery_table
    from secateur.runs.options import put_over, read_mapping
    from secateur.training.recover import recover as run
    from secateur.training.recovery_options import Recovery

    flags: dict[str, Any] = {
        "network": None if network is None else network.value,
        "tokens": tokens,
        "rank": rank,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "length": length,
        "distillation": given({"top_k": top_k}) or None,
        "log_to": None if log_to is None else log_to.value,
        "seed": seed,
        "device": device,
        "dtype": None if dtype is None else dtype.value,
    }
    values = put_over(read_mapping(options, Recovery.noun) if options else {}, given(flags))
    if not blocks:
        values["blocks"] = None
    with progress_bars() as progress:
        result = run(
            model,
            output,
            Recovery.from_mapping(values),
            teacher=teacher,
            data=data,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    notes = [f"block {each.index}: {note}" for each in result.report.blocks for note in each.notes]
    show_result(recovery_table(result.report), [*notes, *result.report.notes], output)
