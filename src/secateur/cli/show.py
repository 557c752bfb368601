"""Commands that show: ``secateur report``, ``ls`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from secateur.cli.flags import DESCRIBED, MACHINE, OPTIONS, AsJson, TrustRemoteCode, with_flags
from secateur.runs.errors import SecateurError

_PATTERNS = {
    "0.5, 50%": "unstructured: that share of all weights, anywhere",
    "2:4": "keep 2 of every 4 consecutive input columns; sparse GPU units use it",
    "n:m": "keep n of every m consecutive input columns, any n and m",
}
_AUTO = {"auto": "What lost least in trials: a plan, rates, masks, reconstruction."}


@with_flags(given={"--device": MACHINE["--device"]})
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="output folders of finished runs")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="the file to write (default: DIR/secateur/report.html)"
        ),
    ] = None,
    continuations: Annotated[
        bool,
        typer.Option("--continuations", help="let the dense and the pruned model write first"),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="the dense model for --continuations (default: what the run names)"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="a text to go on with instead of the usual three; repeatable"),
    ] = None,
    *,
    given: dict[str, Any],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an HTML page about a run, or about several side by side."""
    from secateur.cli.console import progress_bars, say
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
                    **given,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
    say("Report: ", write_report(folders, output))


def ls(
    what: Annotated[
        Literal["methods", "patterns", "allocations", "formats", "calibrations", "tasks"],
        typer.Argument(help="what to list"),
    ],
    as_json: AsJson = False,
) -> None:
    """List what can be chosen, a line each."""
    from rich.table import Table

    from secateur.cli.console import print_json, stdout

    match what:
        case "methods":
            rows = _AUTO | _described("stages")
        case "patterns":
            rows = _PATTERNS
        case "allocations":
            rows = _described(what)
        case _:
            rows = DESCRIBED[what]
    if as_json:
        print_json([{"name": name, "description": text} for name, text in rows.items()])
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for name, text in rows.items():
        table.add_row(name, text)
    stdout.print(table)


def _described(kind: str) -> dict[str, str]:
    named = {name: option for name, option in OPTIONS.items() if option["kind"] == kind}
    return {name.removeprefix(f"{kind}."): option["help"] for name, option in named.items()}


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the smaller checkpoint")
    ] = Path("runs/demo"),
) -> None:
    """Shrink a small model, and show what that costs and what it gains, dense beside result."""
    from secateur.cli.console import progress_bars, say, stdout
    from secateur.demo import run_demo
    from secateur.report.speed import side_by_side
    from secateur.report.terminal import shrink_table

    with progress_bars() as progress:
        result = run_demo(output, progress)
    stdout.print(shrink_table(result.shrunk.report))
    stdout.print(side_by_side(result.evaluation, result.measured))
    say("\nSaved to ", output, f"; every number is in {output / 'report.json'}.")
    say("To look at: ", result.page)
    say(
        f"Dense model: {result.source}\n"
        "Your own: secateur shrink MODEL --output DIR --sparsity 0.3",
        style="dim",
    )
