"""The command that writes for other runtimes: ``secateur export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from secateur.cli.flags import AsJson, Model, TrustRemoteCode, calibration, with_flags


@with_flags(given=calibration("export"))
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="new file or folder")],
    to: Annotated[
        Literal["gguf", "openvino"], typer.Option(help="what the result is for")
    ] = "gguf",
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "int8", "w8a8"],
        typer.Option(help="how matrices are stored; int8, w8a8 in OpenVINO, q… in GGUF"),
    ] = "f16",
    *,
    given: dict[str, Any],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp, or as a folder for OpenVINO."""
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
            **given,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    about = f": {result.bytes:,} bytes, architecture {result.architecture}, type {result.type}."
    say("Saved to ", output, about)
    show_notes(result.notes)
