"""The command that writes for other runtimes: ``secateur export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from secateur.cli.flags import AsJson, Model, TrustRemoteCode


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="new file for the result")],
    to: Annotated[Literal["gguf"], typer.Option(help="format of the file")] = "gguf",
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"],
        typer.Option(help="how matrices are stored"),
    ] = "f16",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp."""
    from secateur.cli.console import print_json, progress_bars, say, show_notes
    from secateur.deploy.export import export as run

    with progress_bars() as progress:
        result = run(
            model,
            output,
            to=to,
            type=type,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    about = f": {result.bytes:,} bytes, architecture {result.architecture}, type {result.type}."
    say("Saved to ", output, about)
    show_notes(result.notes)
