"""``secateur report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Device, TrustRemoteCode
from secateur.runs.errors import SecateurError


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folders of finished runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file to write. (default: DIR/secateur/report.html)"
        ),
    ] = None,
    continuations: Annotated[
        bool,
        typer.Option("--continuations", help="Let the dense and the pruned model write first."),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="The dense model for --continuations. (default: what the run names)"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to go on with instead of the usual three; repeatable."),
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an HTML page about a run, or about several side by side."""
    from secateur.cli.console import progress_bars, stdout
    from secateur.report.page import prepare, write_report

    if not continuations and (reference is not None or prompt):
        raise SecateurError("--reference and --prompt are for --continuations; add it.")
    # What is wrong must show before models write.
    prepare(folders, output)
    if continuations:
        from secateur.evaluation.continuations import PROMPTS, continue_texts

        with progress_bars() as progress:
            for folder in folders:
                continue_texts(
                    folder,
                    reference,
                    prompt or PROMPTS,
                    device=device or "auto",
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
    stdout.print(f"Report: {write_report(folders, output)}", soft_wrap=True)
