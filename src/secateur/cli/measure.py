"""Commands that measure: ``secateur eval``, ``compare``, ``inspect`` and ``simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.flags import (
    MACHINE,
    AsJson,
    Flags,
    Folder,
    Model,
    TrustRemoteCode,
    with_flags,
)

_EVALUATE: Flags = {
    "--text": "evaluation.text",
    "--dataset": "evaluation.dataset",
    "--window": "evaluation.window",
    "--max-windows": "evaluation.max_windows",
    "--tasks": "evaluation.tasks",
    "--task-data": "evaluation.task_data",
    "--limit": "evaluation.limit",
    "--bos": "evaluation.bos",
    **MACHINE,
}


@with_flags(given=_EVALUATE)
def evaluate(
    model: Model,
    given: dict[str, Any],
    against: Annotated[
        str | None,
        typer.Option(help="the dense model: its figures, KL divergence and top-1 agreement"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, zero-shot accuracy, and the distance from the dense model."""
    from secateur.cli.console import print_json, progress_bars, stdout
    from secateur.evaluation.evaluate import evaluate as run
    from secateur.report.terminal import evaluation_table

    with progress_bars() as progress:
        result = run(
            model,
            **given,
            against=against,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        stdout.print(evaluation_table(result))


def compare(
    file: Annotated[Path, typer.Argument(help="YAML: model, calibration, evaluation and rows")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the rows and the table")
    ],
    keep: Annotated[
        bool, typer.Option("--keep", help="keep the checkpoints once they are evaluated")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prune one model in several ways, evaluate them alike, and write one table."""
    from secateur.cli.console import print_json, progress_bars, say, stdout
    from secateur.comparison.run import compare as run
    from secateur.comparison.table import comparison_table

    with progress_bars() as progress:
        result = run(file, output, keep=keep, progress=progress)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    stdout.print(comparison_table(result))
    say("Saved to ", output / "comparison.md", " and comparison.json.")


def inspect(
    folder: Folder, trust_remote_code: TrustRemoteCode = False, as_json: AsJson = False
) -> None:
    """Count the zeros of every linear, from the files alone."""
    from secateur.cli.console import print_json, stdout
    from secateur.models.inspection import inspect as count
    from secateur.report.terminal import inspection_table

    inspection = count(folder, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(inspection.model_dump(mode="json"))
    else:
        stdout.print(inspection_table(inspection))


def simulate(
    folder: Folder,
    memory_traffic: Annotated[
        int | None,
        typer.Option(metavar="BITS", help="charge loading too, of weights with so many bits"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Count cycles, dense and pruned, on an accelerator that skips zeros."""
    from secateur.cli.console import print_json, stdout
    from secateur.deploy.accelerator import Accelerator, Memory
    from secateur.deploy.simulation import simulate as run
    from secateur.deploy.simulation import simulation_table

    memory = None if memory_traffic is None else Memory(weight_bits=memory_traffic)
    simulation = run(folder, Accelerator(memory=memory), trust_remote_code=trust_remote_code)
    if as_json:
        print_json(simulation.model_dump(mode="json"))
    else:
        stdout.print(simulation_table(simulation))
