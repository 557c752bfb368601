"""Find out all that is wrong with a comparison before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from secateur.comparison.options import SEVERAL, Comparison, RowOptions
from secateur.evaluation.inputs import fingerprint_evaluation
from secateur.models.checkpoint import Checkpoint
from secateur.models.inspection import stored_linears
from secateur.models.locate import load_tokenizer
from secateur.patterns.pattern import parse_pattern
from secateur.pruning.job import fingerprint_run
from secateur.pruning.recipe import Recipe
from secateur.runs.device import resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files
from secateur.runs.machine import describe_machine
from secateur.runs.progress import silent
from secateur.runs.run import decides
from secateur.shrinking.job import taken as shrinking
from secateur.shrinking.options import ShrinkOptions
from secateur.text.calibration import source_files
from secateur.text.encoder import Encoder
from secateur.text.sources import SELF
from secateur.training.job import taken as training
from secateur.training.options import Training
from secateur.training.ranks import ALONE
from secateur.training.recover import taken as recovering
from secateur.training.recovery_options import Recovery

DENSE = "dense"
# What the rows have in common and may not say themselves.
_SHARED = ("calibration", "device", "dtype")
# Places in a process's words that are filled when it starts.
_LATER = ("model", "output", "recipe", "tokens")


@dataclass(frozen=True)
class CheckedRow:
    """A row that can run.

    Attributes:
        name: as the file has it.
        folder: name of its folder, the same for the same result.
        command: of ours, or the words of the script as the file has them; None for the dense model.
        words: of the process, with places for what is known once it runs.
        recipe: the options, complete, as YAML; None for the dense model and for scripts.
        start: the row whose checkpoint it works on; None for the dense model's.
        repeats: how often it runs.
        remote: its checkpoint brings code of its own.
        pattern: what its zeros must be, in a script's row that names it.
        yardstick: the row that its time is divided by.
    """

    name: str
    folder: str
    command: str | None = None
    words: tuple[str, ...] = ()
    recipe: str | None = None
    start: str | None = None
    repeats: int = 1
    remote: bool = False
    pattern: str | None = None
    yardstick: str | None = None


@dataclass(frozen=True)
class Checked:
    """A comparison that can run, in plain values.

    Attributes:
        model: local folder of the dense model.
        weights: of its linears in its blocks.
        options: the file without its rows.
        evaluation: fingerprint of the evaluation, which does not hang on the row.
        rows: the dense model, then the others in their order.
        machine: where the comparison runs.
    """

    model: str
    weights: int
    options: dict[str, Any]
    evaluation: str
    rows: list[CheckedRow]
    machine: dict[str, Any]


def check(file: Path, scratch: Path) -> Checked:
    """Check a comparison file to its end.

    Args:
        file: YAML.
        scratch: an empty folder on the disk of the results.

    Raises:
        SecateurError: the file, the model, a row or the evaluation cannot be used.
    """
    comparison = Comparison.from_file(file)
    model, remote = comparison.model, comparison.trust_remote_code
    checkpoint = Checkpoint.open(model, trust_remote_code=remote)
    folder = checkpoint.folder
    dense = decides(model=checkpoint.reader.fingerprint())
    rows = {DENSE: CheckedRow(DENSE, _folder_name(DENSE, dense), remote=remote)}
    for name, row in comparison.rows.items():
        if name == DENSE:
            raise SecateurError(
                f"The row {DENSE} is always there, for the model itself; name yours otherwise."
            )
        try:
            if row.start is not None and row.start not in list(rows)[1:]:
                raise SecateurError(f"no row above it is named {row.start}, to start from.")
            plan = _Plan(
                comparison, row, rows[row.start or DENSE], file.parent, folder, dense, scratch
            )
            rows[name] = plan.checked(name)
        except SecateurError as error:
            raise SecateurError(f"The row {name} cannot run: {error}") from error
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    options = comparison.model_dump(mode="json", exclude={"rows"})
    for part in ("calibration", "evaluation"):
        # What the tokenizer decides stands in the table.
        options[part]["bos"] = Encoder.of(tokenizer, options[part]["bos"]).bos
    evaluated = fingerprint_evaluation(
        model,
        comparison.evaluation,
        device=comparison.device,
        dtype=comparison.evaluation.dtype or comparison.dtype,
        trust_remote_code=remote,
    )
    return Checked(
        model=str(folder),
        weights=sum(weight.numel() for _, weight in stored_linears(checkpoint)),
        options=options,
        evaluation=_digest({**dense, **evaluated}),
        rows=list(rows.values()),
        machine=describe_machine(resolve_device(comparison.device)).model_dump(mode="json"),
    )


@dataclass(frozen=True)
class _Process:
    """Words, options as YAML, and all that decides what they leave."""

    words: list[str]
    recipe: str | None
    decides: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What a row is to do.

    Attributes:
        row: as the comparison's file has it.
        start: the row that it starts from.
        folder: where the file lies.
        model: folder of the dense model, on which rows that start from another are checked too.
        dense: what decides that model.
        scratch: a folder on the disk of the results.
    """

    comparison: Comparison
    row: RowOptions
    start: CheckedRow
    folder: Path
    model: Path
    dense: dict[str, Any]
    scratch: Path

    def checked(self, name: str) -> CheckedRow:
        """Check the row as its command would."""
        row, own = self.row, self.row.own
        commands = {
            "prune": self._prune,
            "shrink": self._shrink,
            "train": self._train,
            "recover": self._recover,
        }
        process = commands[row.command](own) if row.script is None else self._script(own)
        deciding = process.decides | ({} if row.start is None else {"from": self.start.folder})
        return CheckedRow(
            name=name,
            folder=_folder_name(name, deciding),
            command=row.command if row.script is None else shlex.join(map(str, row.script)),
            words=tuple(process.words),
            recipe=process.recipe,
            start=row.start,
            repeats=row.repeats or self.comparison.repeats,
            remote=self.start.remote or row.command == "shrink",
            pattern=str(parse_pattern(str(own["pattern"])))
            if row.script and "pattern" in own
            else None,
            yardstick=self._yardstick(),
        )

    def _prune(self, own: dict[str, Any]) -> _Process:
        recipe = Recipe.from_mapping(self._with_shared(own))
        trust = self.comparison.trust_remote_code
        deciding = fingerprint_run(self.model, recipe, trust_remote_code=trust)
        return _Process(self._words("--recipe", "{recipe}"), recipe.to_yaml(), deciding)

    def _shrink(self, own: dict[str, Any]) -> _Process:
        text = self.comparison.calibration.model_dump(exclude_unset=True)
        if own.get("preset") == "paper":
            # Its samples are those of a round.
            text.pop("samples", None)
            text |= own.pop("calibration", {})
        options = ShrinkOptions.from_mapping(self._with_shared(own) | {"calibration": text})
        trust = self.comparison.trust_remote_code
        with (
            self._unused() as output,
            shrinking(self.model, output, options, None, False, trust, silent) as job,
        ):
            deciding = job.run.manifest.fingerprint
        recipe = _yaml(options.model_dump(mode="json", exclude_unset=True))
        return _Process(self._words("--options", "{recipe}"), recipe, deciding)

    def _train(self, own: dict[str, Any]) -> _Process:
        preset, data = own.pop("preset", "default"), _names(own.pop("data", []))
        validation = own.pop("validation", None)
        # Only a dense model is its own teacher.
        teacher = own.pop("teacher", None if self.row.start is None else self.comparison.model)
        options = Training.from_mapping(self._with_shared(own, "calibration"), preset)
        with (
            self._unused() as output,
            training(
                self.model,
                options,
                output,
                data=data,
                validation=validation,
                teacher=teacher,
                restart=False,
                trust_remote_code=self.comparison.trust_remote_code,
                progress=silent,
                device=resolve_device(options.device),
                ranks=ALONE,
            ) as job,
        ):
            deciding = job.run.manifest.fingerprint
        words = ["--options", "{recipe}", "--preset", preset, *_each("--data", data)]
        words += _each("--validation", [validation]) + _each("--teacher", [teacher])
        return _Process(self._words(*words), _yaml(options.model_dump(mode="json")), deciding)

    def _recover(self, own: dict[str, Any]) -> _Process:
        if self.row.start is None:
            raise SecateurError("recover needs a model that was cut; name its row with from.")
        data, teacher = _names(own.pop("data", [])), own.pop("teacher", self.comparison.model)
        options = Recovery.from_mapping(self._with_shared(own, "calibration"))
        with (
            self._unused() as output,
            recovering(
                self.model,
                options,
                output,
                teacher=teacher,
                data=data,
                restart=False,
                trust_remote_code=self.comparison.trust_remote_code,
                progress=silent,
            ) as job,
        ):
            deciding = job.run.manifest.fingerprint
        words = ["--options", "{recipe}", "--teacher", teacher, *_each("--data", data)]
        return _Process(self._words(*words), _yaml(options.model_dump(mode="json")), deciding)

    def _script(self, own: dict[str, Any]) -> _Process:
        """Another program, of which the words, the files that they name and the text are known."""
        if foreign := [key for key in own if key not in SEVERAL]:
            raise SecateurError(f"a script has no option {foreign[0]}; give it to it as a word.")
        words = [str(word) for word in self.row.script or ()]
        calibration = self.comparison.calibration
        known = {
            "python": sys.executable,
            "folder": str(self.folder.resolve()),
            "dense": str(self.model),
            "calibration": calibration.source,
            "text": self.comparison.evaluation.text,
            **calibration.model_dump(include={"samples", "length", "seed"}),
            **own,
        }
        filled = [_fill(word, known) for word in words]
        if SELF in calibration.shares and "{tokens}" in " ".join(words):
            raise SecateurError("{tokens} are those of a text; name one as calibration.source.")
        if shutil.which(filled[0]) is None:
            raise SecateurError(f"there is no program {filled[0]}; check the path, or install it.")
        for word in filled[1:]:
            if word.endswith(".py") and not Path(word).is_file():
                raise SecateurError(f"there is no script {word}; check the path.")
        deciding = {
            "script": words,
            "options": own,
            "files": fingerprint_files(Path(word) for word in filled if Path(word).is_file()),
            "calibration": calibration.model_dump(mode="json"),
            "calibration text": fingerprint_files(source_files(calibration)),
        }
        return _Process(filled, None, self.dense | deciding)

    def _words(self, *more: str) -> list[str]:
        trust = ["--trust-remote-code"] if self.start.remote else []
        return [self.row.command, "{model}", "--output", "{output}", *more, *trust]

    def _with_shared(self, own: dict[str, Any], *unused: str) -> dict[str, Any]:
        """Put what all rows share to the options of one, which may not have it too."""
        if given := [name for name in _SHARED if name in own]:
            raise SecateurError(
                f"it has {given[0]} of its own, which all rows share; move it to the top of the "
                "file."
            )
        names = set(_SHARED) - set(unused)
        return own | self.comparison.model_dump(mode="json", include=names)

    def _yardstick(self) -> str | None:
        """The row that its time is divided by: that of its pattern, if there are several."""
        bare, rows = self.comparison.yardstick, self.comparison.rows
        if bare is None or bare in rows:
            return bare
        if not any(name.startswith(f"{bare}, ") for name in rows):
            raise SecateurError(f"its yardstick is to be {bare}, and no row has that name.")
        values = [self.row.own[key] for key in SEVERAL if key in self.row.own]
        return next((name for name in (f"{bare}, {each}" for each in values) if name in rows), None)

    @contextmanager
    def _unused(self) -> Iterator[Path]:
        """An output folder that nothing is written to but what belongs to its check."""
        with TemporaryDirectory(dir=self.scratch) as folder:
            yield Path(folder)


def _fill(word: str, known: Mapping[str, Any]) -> str:
    """Put values in a word's places, but for those that are known later."""

    def value(place: re.Match[str]) -> str:
        if place[1] in _LATER:
            return place[0]
        if not isinstance(known.get(place[1]), str | int | float | Path):
            places = ", ".join([*known, *_LATER])
            raise SecateurError(f"the place {place[0]} of its script has no value; {places} do.")
        return str(known[place[1]])

    return re.sub(r"\{(\w+)\}", value, word)


def _names(data: object) -> list[str]:
    return [str(name) for name in data] if isinstance(data, list) else [str(data)]


def _each(flag: str, values: Iterable[str | None]) -> list[str]:
    return [part for value in values if value is not None for part in (flag, value)]


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _folder_name(name: str, deciding: dict[str, Any]) -> str:
    plain = re.sub(r"[^\w.+@-]+", "-", name)
    return f"{plain}-{_digest(deciding)}"


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
