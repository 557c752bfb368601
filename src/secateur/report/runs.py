"""What the folders of finished runs hold, as far as a page shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.report.facts import Facts
from secateur.runs.errors import SecateurError

Kind = Literal["prune", "shrink", "recover", "train", "curve"]

# What a report of each kind has, and none of the kinds below it.
_MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("recover", ("validation", "blocks")),
    ("prune", ("blocks",)),
    ("shrink", ("sub_blocks",)),
    ("train", ("validation",)),
)


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
        simulation: what ``secateur simulate`` said of it.
        continuations: how it and the dense model go on with the same texts.
        unread: files beside the report that are no JSON.
    """

    label: str
    folder: Path
    kind: Kind
    report: Facts
    log: Sequence[Facts]
    evaluations: Sequence[Facts]
    simulation: Facts
    continuations: Facts
    unread: Sequence[str]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the folders of finished runs, each of them once.

    Raises:
        SecateurError: a folder is missing or holds no finished run.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    different = list({path.resolve(): path for path in paths}.values())
    labels = _labels([path.resolve() for path in different])
    return [_read(path, label) for path, label in zip(different, labels, strict=True)]


def _read(folder: Path, label: str) -> Run:
    kind, report = _document(folder)
    work = folder / "secateur"
    unread: list[str] = []

    def beside(path: Path) -> Facts:
        if not path.is_file():
            return Facts()
        try:
            found = _json(path)
        except ValueError:
            found = Facts()
        if not isinstance(found.value, dict):
            unread.append(path.name)
            return Facts()
        return found

    evaluations = [beside(path) for path in sorted(work.glob("evaluation*.json"))]
    return Run(
        label,
        folder,
        kind,
        report,
        log=_log(work / "training" / "log.jsonl") if kind in ("train", "recover") else (),
        evaluations=[each for each in evaluations if each],
        simulation=beside(work / "simulation.json"),
        continuations=beside(work / "continuations.json"),
        unread=unread,
    )


def _document(folder: Path) -> tuple[Kind, Facts]:
    if not folder.is_dir():
        raise SecateurError(f"There is no folder {folder}; name the output folder of a run.")
    path = next(
        (path for name in ("report.json", "curve.json") if (path := folder / name).is_file()), None
    )
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
        report = _json(path)
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


def _json(path: Path) -> Facts:
    """Read a file; bytes that are no text, and nesting without end, are no JSON either."""
    try:
        return Facts(json.loads(path.read_bytes()))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _log(path: Path) -> list[Facts]:
    """Whole lines; a killed run may have left half of one."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(Facts(json.loads(line)))
        except ValueError:
            continue
    return entries


def _labels(paths: Sequence[Path]) -> list[str]:
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
