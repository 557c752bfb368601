"""Run what is missing of a comparison, each row in processes of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from secateur.comparison.document import ComparisonResult, Cost, Pruned, Row
from secateur.comparison.table import comparison_markdown
from secateur.runs.errors import SecateurError
from secateur.runs.files import remove, write_json, write_text, writing
from secateur.runs.lock import locked
from secateur.runs.processes import apart, measure, output_of
from secateur.runs.progress import Progress, silent

if TYPE_CHECKING:
    from secateur.comparison.check import Checked, CheckedRow

_SECATEUR = (sys.executable, "-m", "secateur")
# A counted share may miss that of the pattern by so much.
_TOLERANCE = 0.0005


def compare(
    file: str | Path,
    output: str | Path,
    *,
    keep: bool = False,
    progress: Progress = silent,
) -> ComparisonResult:
    """Make checkpoints of one model in several ways, evaluate all, and write one table.

    A row that is finished in ``output`` is not computed again; one that was interrupted goes on.
    Every row is made in fresh processes. What a process costs is seen too high where this one is
    larger than it, so call this from a process that has not loaded much.

    Args:
        file: a YAML file with model, calibration, evaluation and rows.
        output: a folder for the rows, ``comparison.json`` and ``comparison.md``.
        keep: keep the checkpoints; otherwise each goes once nothing needs it any more.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: something is wrong with the file, before anything runs; or rows failed,
            after the others have run; or another process works in the folder.
    """
    target = Path(output).expanduser()
    with writing(target):
        _check_target(target)
        beside = next(folder for folder in target.resolve().parents if folder.is_dir())
        scratch = Path(mkdtemp(prefix=".secateur-", dir=beside))
    try:
        checked = apart(_check, Path(file).expanduser(), scratch)
    finally:
        remove(scratch)
    with locked(target / "rows"):
        return _Comparison(checked, target, keep).run(progress)


def _check_target(target: Path) -> None:
    """Raise SecateurError unless a comparison can begin, or go on, in a folder."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise SecateurError(f"The output {target} is no folder; name a new or empty one.")
    if not (target / "rows").is_dir() and any(target.iterdir()):
        raise SecateurError(
            f"The output folder {target} holds something that is not a comparison; name a new or "
            "empty folder."
        )


def _check(file: Path, scratch: Path) -> Checked:
    # Imported here and called apart: it needs torch.
    from secateur.comparison.check import check

    return check(file, scratch)


class _Comparison:
    """A comparison that holds its output folder."""

    def __init__(self, checked: Checked, output: Path, keep: bool) -> None:
        self.checked = checked
        self.output = output
        self.keep = keep
        self.rows = {row.name: row for row in checked.rows}

    def run(self, progress: Progress) -> ComparisonResult:
        """Do what is missing, a turn of every row before the next turn of any."""
        result: ComparisonResult | None = None
        failed: dict[str, SecateurError] = {}
        turns = [(row, turn) for row in self.checked.rows for turn in range(row.repeats)]
        turns.sort(key=lambda each: each[1])
        for row in self.checked.rows:
            remove(self._folder(row) / ".gone")
        for done, (row, turn) in enumerate(turns):
            progress("Comparing", done, len(turns))
            if row.name in failed:
                continue
            try:
                if row.start in failed:
                    raise SecateurError(f"{row.start}, which it starts from, is not there.")
                self._take_turn(row, turn)
            except SecateurError as error:
                failed[row.name] = error
                continue
            result = self._write_result()
            if not self.keep:
                self._drop_checkpoints()
        progress("Comparing", len(turns), len(turns))
        if failed or result is None:
            raise SecateurError(
                "\n".join(f"The row {name} failed: {error}" for name, error in failed.items())
                + f"\nWhat is finished is in {self.output / 'comparison.md'}; the same command "
                "tries the rest again."
            )
        return result

    def _take_turn(self, row: CheckedRow, turn: int) -> None:
        folder = self._folder(row)
        folder.mkdir(parents=True, exist_ok=True)
        if row.words and turn > 0:
            made = self._made(row)
            if made is not None and len(made.runs) <= turn:
                self._repeat(row, made)
            return
        if row.words and self._made(row) is None:
            # What an older version may have left unfinished.
            remove(folder / "pruned")
            self._checkpoint(row)
        if not self._evaluation(row).is_file():
            write_json(self._evaluation(row), self._evaluate(row))

    def _checkpoint(self, row: CheckedRow) -> Path:
        """The folder of a row's checkpoint, which is made if it is not there."""
        if not row.words:
            return Path(self.checked.model)
        folder = self._folder(row)
        checkpoint, unfinished = folder / "pruned", folder / "unfinished"
        if checkpoint.is_dir():
            return checkpoint
        if row.recipe is None:
            remove(unfinished)
        resumed = unfinished.is_dir()
        cost = self._execute(row, unfinished, resumed)
        if self._made(row) is None:
            report: dict[str, Any] = {}
            if row.recipe is not None:
                report = json.loads((unfinished / "report.json").read_text(encoding="utf-8"))
                write_json(folder / "report.json", report)
            sparsity, weights = self._count(row, unfinished)
            made = Pruned(
                sparsity=sparsity,
                weights=weights,
                runs=(cost,),
                peak_device_bytes=report.get("peak_device_memory_bytes"),
                size_bytes=_size(unfinished),
            )
            write_json(folder / "pruned.json", made.model_dump(mode="json"))
        return unfinished.rename(checkpoint)

    def _repeat(self, row: CheckedRow, made: Pruned) -> None:
        again = self._folder(row) / "again"
        remove(again)
        cost = self._execute(row, again, False)
        remove(again)
        made = made.model_copy(update={"runs": (*made.runs, cost)})
        write_json(self._folder(row) / "pruned.json", made.model_dump(mode="json"))

    def _execute(self, row: CheckedRow, output: Path, resumed: bool) -> Cost:
        """Run a row's process, from a model on disk to a checkpoint on disk."""
        folder = self._folder(row)
        tokens = self.output / "rows" / "tokens.safetensors"
        places = {
            "model": self._checkpoint(self.rows[row.start]) if row.start else self.checked.model,
            "output": output,
            "recipe": folder / "recipe.yaml",
            "tokens": tokens,
        }
        if row.recipe is not None:
            write_text(folder / "recipe.yaml", row.recipe)
        if "{tokens}" in " ".join(row.words):
            text = self.checked.options["calibration"]
            apart(_write_tokens, Path(self.checked.model), text, tokens)
        words = [*(() if row.recipe is None else _SECATEUR), *row.words]
        for place, value in places.items():
            words = [word.replace(f"{{{place}}}", str(value)) for word in words]
        measured = measure(words, folder / "run.log")
        if not (output / "config.json").is_file() or not _size(output):
            raise SecateurError(f"{words[0]} left no checkpoint of safetensors in {output}.")
        return Cost(**asdict(measured), resumed=resumed)

    def _count(self, row: CheckedRow, checkpoint: Path) -> tuple[float | None, int | None]:
        """Sparsity and weights of the linears in the blocks, from the files."""
        try:
            sparsity, weights, patterns = apart(_inspect, checkpoint, row.remote)
        except SecateurError:
            # Other programs have formats of their own.
            if row.recipe is not None:
                raise
            return None, None
        if row.pattern is not None:
            kept, _, group = row.pattern.partition(":")
            wanted = 1 - int(kept) / int(group) if group else float(row.pattern)
            if abs(sparsity - wanted) > _TOLERANCE or (group and row.pattern not in patterns):
                raise SecateurError(
                    f"its files have {sparsity:.4f} zeros, and not the pattern {row.pattern}."
                )
        return sparsity, weights

    def _evaluate(self, row: CheckedRow) -> Any:
        """Evaluate on the text, beside the dense model, and then on the tasks alone."""
        options, checkpoint = self.checked.options["evaluation"], self._checkpoint(row)
        compared = ["--against", self.checked.model] if row.words else []
        common = [*_SECATEUR, "eval", str(checkpoint), "--json"]
        common += ["--device", self.checked.options["device"]]
        common += ["--dtype", options["dtype"] or self.checked.options["dtype"]]
        common += ["--bos", options["bos"]]
        common += ["--trust-remote-code"] if row.remote else []
        text = [*_flags(options, "text", "dataset", "window", "max_windows"), *compared]
        log = self._folder(row) / "evaluation.log"
        result = json.loads(output_of([*common, *text], log))
        if options["tasks"]:
            tasks = ["--tasks", ",".join(options["tasks"]), *_flags(options, "task_data", "limit")]
            result["zero_shot"] = json.loads(output_of([*common, *tasks], log))["zero_shot"]
        return result

    def _write_result(self) -> ComparisonResult:
        """Write the tables of all rows that are evaluated."""
        rows: list[Row] = []
        for row in self.checked.rows:
            made, evaluation = self._made(row), self._evaluation(row)
            if evaluation.is_file() and (made or not row.words):
                rows.append(
                    Row(
                        name=row.name,
                        command=row.command,
                        start=row.start,
                        recipe=row.recipe,
                        pruned=made,
                        size_bytes=_size(Path(self.checked.model))
                        if made is None
                        else made.size_bytes,
                        evaluation=json.loads(evaluation.read_text(encoding="utf-8")),
                        folder=str(self._folder(row).relative_to(self.output)),
                        yardstick=row.yardstick,
                    )
                )
        result = ComparisonResult(
            options=self.checked.options,
            weights=self.checked.weights,
            rows=rows,
            machine=self.checked.machine,
        )
        write_json(self.output / "comparison.json", result.model_dump(mode="json"))
        write_text(self.output / "comparison.md", comparison_markdown(result))
        return result

    def _drop_checkpoints(self) -> None:
        """Remove those that neither their own row nor one that starts from it needs any more."""
        needed = {row.start for row in self.checked.rows if not self._is_finished(row)}
        for row in self.checked.rows:
            checkpoint = self._folder(row) / "pruned"
            if checkpoint.is_dir() and self._is_finished(row) and row.name not in needed:
                # In one step, so that no part of a checkpoint is ever taken for the whole.
                remove(checkpoint.rename(self._folder(row) / ".gone"))

    def _is_finished(self, row: CheckedRow) -> bool:
        made = self._made(row)
        runs = len(made.runs) if made else 0
        return self._evaluation(row).is_file() and (not row.words or runs >= row.repeats)

    def _made(self, row: CheckedRow) -> Pruned | None:
        path = self._folder(row) / "pruned.json"
        if not path.is_file():
            return None
        return Pruned.model_validate_json(path.read_text(encoding="utf-8"))

    def _evaluation(self, row: CheckedRow) -> Path:
        return self._folder(row) / f"evaluation-{self.checked.evaluation}.json"

    def _folder(self, row: CheckedRow) -> Path:
        return self.output / "rows" / row.folder


def _inspect(checkpoint: Path, trust_remote_code: bool) -> tuple[float, int, list[str]]:
    from secateur.models.inspection import inspect

    found = inspect(checkpoint, trust_remote_code=trust_remote_code)
    return found.sparsity, found.weights, found.patterns


def _write_tokens(model: Path, calibration: dict[str, Any], file: Path) -> None:
    """Write the windows that our own rows calibrate on, for a script."""
    from secateur.models.locate import load_tokenizer
    from secateur.runs.files import write_safetensors
    from secateur.text.calibration import load_calibration
    from secateur.text.options import CalibrationOptions

    text = load_calibration(CalibrationOptions.model_validate(calibration), load_tokenizer(model))
    write_safetensors(file, {"input_ids": text.tokens})


def _flags(options: dict[str, Any], *names: str) -> list[str]:
    given = [(name, options[name]) for name in names if options[name] is not None]
    return [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
