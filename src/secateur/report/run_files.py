"""What the folders of finished runs hold, as far as a page shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.runs.errors import SecateurError

Kind = Literal["prune", "shrink", "recover", "train", "curve"]

# What a report of each kind has, and none of the kinds below it.
_MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("recover", ("validation", "blocks")),
    ("prune", ("blocks",)),
    ("shrink", ("sub_blocks",)),
    ("train", ("validation",)),
)
# What is larger than this is no measurement, and overflows in arithmetic.
_LARGEST = 1e100


@dataclass(frozen=True)
class Json:
    """A value of a JSON file that may be old, new or damaged.

    It is asked by path; what is missing or of another kind is None.
    """

    value: object = None

    def at(self, *path: str | int) -> Json:
        """What lies at the end of the path."""
        value = self.value
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return Json()
        return Json(value)

    def number(self, *path: str | int) -> float | None:
        """A finite number."""
        value = self.at(*path).value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        # A NaN is not within any limits.
        return float(value) if -_LARGEST < value < _LARGEST else None

    def text(self, *path: str | int) -> str | None:
        """A text that is not empty."""
        value = self.at(*path).value
        return value if isinstance(value, str) and value else None

    def items(self, *path: str | int) -> list[Json]:
        value = self.at(*path).value
        return [Json(item) for item in value] if isinstance(value, list) else []

    def texts(self, *path: str | int) -> list[str]:
        return [text for item in self.items(*path) if (text := item.text())]

    def pairs(self, *path: str | int) -> Iterator[tuple[str, Json]]:
        value = self.at(*path).value
        if isinstance(value, dict):
            for key, inner in value.items():
                yield str(key), Json(inner)

    def __bool__(self) -> bool:
        return self.value is not None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        label: its folder's name, with as much before it as tells it from the other runs.
        folder: where it is.
        kind: what was done.
        report: its ``report.json``, or ``curve.json``.
        log: lines of a training log.
        evaluations: what ``secateur eval`` said of it.
        benches: what ``secateur bench`` said of it.
        simulation: what ``secateur simulate`` said of it.
        continuations: how it and the dense model go on with the same texts.
        unread: files beside the report that are no JSON.
    """

    label: str
    folder: Path
    kind: Kind
    report: Json
    log: Sequence[Json]
    evaluations: Sequence[Json]
    benches: Sequence[Json]
    simulation: Json
    continuations: Json
    unread: Sequence[str]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the folders of finished runs, each of them once.

    Raises:
        SecateurError: a folder is missing or holds no finished run.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    different = list({path.resolve(): path for path in paths}.values())
    labels = distinct_names([path.resolve() for path in different])
    return [_read(path, label) for path, label in zip(different, labels, strict=True)]


def _read(folder: Path, label: str) -> Run:
    kind, report = _report(folder)
    work = folder / "secateur"
    unread: list[str] = []

    def beside(path: Path) -> Json:
        if not path.is_file():
            return Json()
        try:
            found = _parsed(path)
        except ValueError:
            found = Json()
        if isinstance(found.value, dict):
            return found
        unread.append(path.name)
        return Json()

    return Run(
        label,
        folder,
        kind,
        report,
        log=_log(work / "training" / "log.jsonl") if kind in ("train", "recover") else (),
        evaluations=[
            found for path in sorted(work.glob("evaluation*.json")) if (found := beside(path))
        ],
        benches=[found for path in sorted(work.glob("bench*.json")) if (found := beside(path))],
        simulation=beside(work / "simulation.json"),
        continuations=beside(work / "continuations.json"),
        unread=unread,
    )


def _report(folder: Path) -> tuple[Kind, Json]:
    if not folder.is_dir():
        raise SecateurError(f"There is no folder {folder}; name the output folder of a run.")
    paths = (folder / "report.json", folder / "curve.json")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        if (folder / "secateur" / "manifest.json").is_file():
            raise SecateurError(
                f"The run in {folder} is not finished; give its command again, which goes on."
            )
        raise SecateurError(
            f"{folder} has neither report.json nor curve.json; name the output folder of a "
            "finished run of prune, shrink, recover or train."
        )
    try:
        report = _parsed(path)
    except ValueError as error:
        raise SecateurError(
            f"{path} is no JSON ({error}); run the command that wrote it again."
        ) from error
    if path.name == "curve.json" and report.items("points"):
        return "curve", report
    for kind, marks in _MARKS:
        if all(report.at(mark) for mark in marks):
            return kind, report
    raise SecateurError(
        f"{path} is no report of prune, shrink, recover or train; name the output folder of such "
        "a run."
    )


def parse_file(path: Path) -> Json:
    """Read a file that may be missing or damaged."""
    try:
        return _parsed(path)
    except (OSError, ValueError):
        return Json()


def _parsed(path: Path) -> Json:
    """Read a file; bytes that are no text, and nesting without end, are no JSON either."""
    try:
        return Json(json.loads(path.read_bytes()))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _log(path: Path) -> list[Json]:
    """Whole lines; a killed run may have left half of one."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entries.append(Json(json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return entries


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, with their parents' as far as equal ones need them."""
    labels = [path.name or str(path) for path in paths]
    depth = 1
    while len(set(labels)) < len(labels):
        depth += 1
        labels = [
            "/".join(path.parts[-depth:]) if labels.count(label) > 1 else label
            for path, label in zip(paths, labels, strict=True)
        ]
    return labels
