"""``secateur bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.flags import AsJson, Flags, TrustRemoteCode, with_flags

_BENCH: Flags = {
    "--batch": "bench.batch",
    "--prefill": "bench.prefill",
    "--prompt": "bench.prompt",
    "--decode": "bench.decode",
    "--turns": "bench.turns",
    "--limit": "bench.limit",
    "--threads": "bench.threads",
    "--runtimes": "bench.runtimes",
    "--device": "bench.device",
    "--dtype": "bench.dtype",
}


@with_flags(given=_BENCH)
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="checkpoint folders, .gguf files, OpenVINO folders"),
    ],
    given: dict[str, Any],
    against: Annotated[
        Path | None,
        typer.Option(help="the dense model that ratios are of (default: the first model)"),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="folder of a run whose page shows the result too, such as that of an exported "
            "file; repeatable"
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed, memory and size in every runtime here that opens the models."""
    from secateur.cli.console import print_json, progress_bars, say, stdout
    from secateur.deploy.bench.bench import bench as run
    from secateur.deploy.bench.bench import keep, require_runs
    from secateur.report.speed import bench_table

    require_runs(report or [])
    with progress_bars() as progress:
        result = run(
            models,
            against=against,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **given,
        )
    folders = [each if each.is_dir() else each.parent for each in models]
    pages = keep(result, [*(report or []), *folders])
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    stdout.print(bench_table(result))
    for page in pages:
        say("Shown on ", page)
