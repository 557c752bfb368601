"""Run what is missing of a comparison, each row in processes of its own."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.comparison.document import ComparisonResult, Pruned, Row
from secateur.comparison.table import comparison_markdown
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json, write_text
from secateur.runs.processes import apart, measure, output_of
from secateur.runs.progress import Progress, silent

if TYPE_CHECKING:
    from secateur.comparison.options import Checked, CheckedRow

_SECATEUR = (sys.executable, "-m", "secateur")


def compare(
    file: str | Path,
    output: str | Path,
    *,
    keep: bool = False,
    progress: Progress = silent,
) -> ComparisonResult:
    """Prune one model by several recipes, evaluate all, and write one table.

    A row that is finished in ``output`` is not computed again; one that was interrupted goes on.
    Every row is pruned in a fresh process. What a process costs is seen too high where this one
    is larger than it, so call this from a process that has not loaded much.

    Args:
        file: a YAML file with model, calibration, evaluation and rows.
        output: a folder for the rows, ``comparison.json`` and ``comparison.md``.
        keep: keep the pruned checkpoints; otherwise each goes once it is evaluated.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: something is wrong with the file, before anything runs; or rows failed,
            after the others have run.
    """
    checked = apart(_check, Path(file).expanduser())
    target = Path(output).expanduser()
    rows: list[Row] = []
    failed: dict[str, SecateurError] = {}
    for index, row in enumerate(checked.rows):
        progress("Comparing", index, len(checked.rows))
        try:
            rows.append(_run(checked, row, target, keep))
        except SecateurError as error:
            failed[row.name] = error
            continue
        result = ComparisonResult(options=checked.options, rows=rows, machine=checked.machine)
        write_json(target / "comparison.json", result.model_dump(mode="json"))
        write_text(target / "comparison.md", comparison_markdown(result))
    progress("Comparing", len(checked.rows), len(checked.rows))
    if failed:
        raise SecateurError(
            "\n".join(f"The row {name} failed: {error}" for name, error in failed.items())
            + f"\nWhat is finished is in {target / 'comparison.md'}; the same command tries the "
            "rest again."
        )
    return result


def _check(file: Path) -> Checked:
    # Imported here and called apart: it needs torch.
    from secateur.comparison.options import check

    return check(file)


def _run(checked: Checked, row: CheckedRow, output: Path, keep: bool) -> Row:
    """Do what is missing of a row."""
    folder = output / "rows" / row.folder
    checkpoint = folder / "pruned"
    made, evaluated = folder / "pruned.json", folder / f"evaluation-{checked.evaluation}.json"
    shutil.rmtree(folder / ".gone", ignore_errors=True)
    if row.recipe is not None and not (
        made.is_file() and (evaluated.is_file() or checkpoint.is_dir())
    ):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", row.recipe)
        write_json(made, _prune(checked, folder, checkpoint).model_dump(mode="json"))
    if not evaluated.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(evaluated, _evaluate(checked, row, folder, checkpoint))
    if not keep and checkpoint.is_dir():
        # In one step, so that no part of a checkpoint is ever taken for the whole.
        shutil.rmtree(checkpoint.rename(folder / ".gone"))
    pruned = Pruned.model_validate_json(made.read_text()) if row.recipe is not None else None
    return Row(
        name=row.name,
        recipe=row.recipe,
        pruned=pruned,
        size_bytes=_size(Path(checked.model)) if pruned is None else pruned.size_bytes,
        evaluation=json.loads(evaluated.read_text()),
        folder=str(folder.relative_to(output)),
    )


def _prune(checked: Checked, folder: Path, checkpoint: Path) -> Pruned:
    resumed = checkpoint.is_dir()
    command = [*_SECATEUR, "prune", checked.model, "--output", str(checkpoint)]
    command += ["--recipe", str(folder / "recipe.yaml"), *_trust(checked)]
    measured = measure(command, folder / "prune.log")
    report = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
    return Pruned(
        sparsity=report["sparsity"]["counted"],
        **asdict(measured),
        peak_device_bytes=report["peak_device_memory_bytes"],
        resumed=resumed,
        size_bytes=_size(checkpoint),
    )


def _evaluate(checked: Checked, row: CheckedRow, folder: Path, checkpoint: Path) -> Any:
    """Evaluate on the text, beside the dense model, and then on the tasks alone."""
    options, subject = checked.options["evaluation"], checked.model
    compared: list[str] = []
    if row.recipe is not None:
        subject, compared = str(checkpoint), ["--against", checked.model]
    common = [*_SECATEUR, "eval", subject, "--json", "--device", checked.options["device"]]
    common += ["--dtype", checked.options["dtype"], *_trust(checked)]
    text = [*_flags(options, "text", "dataset", "window", "max_windows"), *compared]
    text += ["--bos"] if options["bos"] else []
    log = folder / "evaluation.log"
    result = json.loads(output_of([*common, *text], log))
    if options["tasks"]:
        tasks = ["--tasks", ",".join(options["tasks"]), *_flags(options, "task_data", "limit")]
        result["zero_shot"] = json.loads(output_of([*common, *tasks], log))["zero_shot"]
    return result


def _flags(options: dict[str, Any], *names: str) -> list[str]:
    given = [(name, options[name]) for name in names if options[name] is not None]
    return [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]


def _trust(checked: Checked) -> list[str]:
    return ["--trust-remote-code"] if checked.options["trust_remote_code"] else []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
