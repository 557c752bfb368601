"""One life of a run: look → take → work → report → page → complete → clean."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from secateur.runs.errors import TRACE, SecateurError, trace_kept
from secateur.runs.files import digest_of, is_signed, remove, remove_parts, write_json, writing
from secateur.runs.lock import LOCK, locked, require_free
from secateur.runs.machine import package_versions

_SCHEMA = 2
_FOLDER = "secateur"
PAGE = f"{_FOLDER}/report.html"
# Users write in it, and commands that measure do.
_CARD = "README.md"

R = TypeVar("R", bound=BaseModel)


class Manifest(BaseModel):
    """What ``OUTPUT/secateur/manifest.json`` holds.

    Attributes:
        schema_version: of this form.
        fingerprint: everything that decides the bytes of the result.
        text: what the report says of the text, once it is on disk.
        finished: what the report says of each finished unit of work, in order.
        files: digests, by name below the output folder, of what a later session relies on.
        clearing: an older run is still being removed from the folder.
        complete: the result is whole.
    """

    schema_version: int = _SCHEMA
    fingerprint: dict[str, Any]
    text: dict[str, Any] = {}
    finished: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    clearing: bool = False
    complete: bool = False


class Run:
    """A run that holds its output folder.

    Attributes:
        output: where the result goes.
        folder: where everything is kept that is not the result itself.
        manifest: what is finished.
    """

    def __init__(self, output: Path, manifest: Manifest) -> None:
        self.output = output
        self.folder = output / _FOLDER
        self.manifest = manifest

    @staticmethod
    def look(output: Path, *, restart: bool = False) -> Manifest | None:
        """Look at an output folder before anything else is read; nothing is changed.

        Args:
            output: the folder.
            restart: whatever an earlier run left there is to go, so it need not be readable.

        Returns:
            The manifest of the run that began there, None in a new or empty folder.

        Raises:
            SecateurError: the folder holds something else, or another process works in it.
        """
        with writing(output):
            if output.is_symlink() and not output.exists():
                raise SecateurError(
                    f"The output {output} is a link to nothing; name a new or empty folder."
                )
            if not output.exists():
                return None
            if not output.is_dir():
                raise SecateurError(f"The output {output} is a file; name a new or empty folder.")
            require_free(output / _FOLDER)
            if (output / _FOLDER / "manifest.json").is_file():
                return _read_manifest(output, restart)
            if not all(_is_ours(path, output) for path in output.rglob("*")):
                raise SecateurError(
                    f"The output folder {output} holds something that is not an interrupted run; "
                    "name a new or empty folder."
                )
        return None

    @classmethod
    @contextmanager
    def take(
        cls, output: Path, fingerprint: dict[str, Any], *, restart: bool, joins: bool = False
    ) -> Iterator[Run]:
        """Hold the folder of a new run, or of an interrupted or finished one.

        Args:
            output: the folder.
            fingerprint: everything that decides the bytes of the result.
            restart: remove what an earlier run left.
            joins: another process of the same run holds the folder already.

        Raises:
            SecateurError: the folder holds something else, a run of other things, or damaged
                files; or another process works in it.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        if joins:
            yield cls(output, _read_manifest(output))
            return
        manifest = cls.look(output, restart=restart)
        existed = output.exists()
        try:
            with locked(output / _FOLDER):
                # Another process may have been here between the look and the lock.
                if (output / _FOLDER / "manifest.json").is_file():
                    manifest = _read_manifest(output, restart)
                run = cls(output, manifest or Manifest(fingerprint=fingerprint))
                run._begin(fingerprint, is_new=manifest is None, restart=restart)
                with trace_kept(run.folder):
                    yield run
        finally:
            if not (output / _FOLDER / "manifest.json").exists():
                _remove_empty([output / _FOLDER, *([] if existed else [output])])

    def live(
        self,
        document: type[R],
        work: Callable[[], R],
        *,
        page: Callable[[Path], object],
        temporary: Iterable[str] = (),
        report: str = "report.json",
    ) -> R:
        """Do what is left of the run; of a finished one, make sure that all of it is there.

        Args:
            document: what the report file holds.
            work: writes the result and returns the report.
            page: writes the page, given the output folder.
            temporary: patterns of what only an unfinished run needs, below ``folder``.
            report: name of the report file.

        Raises:
            SecateurError: whatever the work raises; or a file of a finished run is damaged.
        """
        path = self.output / report
        if not self.manifest.complete:
            write_json(path, work().model_dump(mode="json"))
            page(self.output)
            self._complete()
        else:
            self.check_files()
            if not (self.output / PAGE).is_file():
                page(self.output)
        for pattern in (TRACE, *temporary):
            for left in self.folder.glob(pattern):
                remove(left)
        for folder in (self.output, *self._subfolders()):
            remove_parts(folder)
        return document.model_validate_json(path.read_text(encoding="utf-8"))

    @property
    def finished(self) -> list[dict[str, Any]]:
        """What the report says of each finished unit of work."""
        return self.manifest.finished

    def record(self, unit: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Note that the next unit of work is on disk, in these files."""
        self.manifest.finished.append(unit)
        self.keep(files)

    def keep(self, files: Iterable[Path], text: dict[str, Any] | None = None) -> None:
        """Note files that a later session goes on from, and what the report says of a text."""
        for path in files:
            self.manifest.files[str(path.relative_to(self.output))] = digest_of(path)
        if text is not None:
            self.manifest.text = text
        self._write()

    def has(self, path: Path) -> bool:
        """Whether ``keep`` has noted a file."""
        return str(path.relative_to(self.output)) in self.manifest.files

    def check_files(self) -> None:
        """Hold every noted file against its digest.

        Raises:
            SecateurError: one is missing or has other bytes.
        """
        for name, digest in self.manifest.files.items():
            path = self.output / name
            if not path.is_file():
                problem = "is missing"
            elif digest_of(path) != digest:
                problem = "is damaged or was changed, its bytes are not those that the run wrote"
            else:
                continue
            raise SecateurError(f"{path} {problem}; put it back, or start over with --restart.")

    def _begin(self, fingerprint: dict[str, Any], *, is_new: bool, restart: bool) -> None:
        changed = _differences(self.manifest.fingerprint, fingerprint)
        if changed and not restart:
            raise SecateurError(
                f"{self.output} was begun with another {', '.join(changed)}; run it as it was "
                "begun, choose another folder, or start over with --restart."
            )
        if not is_new and (restart or self.manifest.clearing):
            earlier = self.manifest.files
            # Killed while it clears, the run clears on when it is started again.
            self.manifest = Manifest(fingerprint=fingerprint, files=earlier, clearing=True)
            self._write()
            self._clear(earlier)
            self.manifest = Manifest(fingerprint=fingerprint)
        elif not is_new and not self.manifest.complete:
            self.check_files()
        self._write()

    def _complete(self) -> None:
        """Note that the result is whole, with the digests of its files."""
        noted = self.manifest.files
        written = [path for path in self.output.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self.output)) for path in written]
        self.manifest.files = {
            name: noted.get(name) or digest_of(path)
            for name, path in zip(names, written, strict=True)
            if name != _CARD
            and (not name.startswith(f"{_FOLDER}/") or name.startswith(f"{_FOLDER}/masks/"))
        }
        self.manifest.complete = True
        self._write()

    def _clear(self, names: Iterable[str]) -> None:
        """Remove what the earlier run wrote, and nothing else; the lock stays."""
        for name in names:
            remove(self.output / name)
        for pattern in ("model*.safetensors*", *_REPORTS):
            for path in self.output.glob(pattern):
                remove(path)
        if is_signed(self.output / _CARD):
            remove(self.output / _CARD)
        for path in self.folder.iterdir():
            if path.name not in (LOCK, "manifest.json"):
                remove(path)
        remove_parts(self.output)

    def _subfolders(self) -> list[Path]:
        return [path for path in self.output.rglob("*") if path.is_dir()]

    def _write(self) -> None:
        write_json(self.folder / "manifest.json", self.manifest.model_dump(mode="json"))


_REPORTS = ("report.json", "plan.json", "curve.json", "curve.svg")


def check_apart(output: Path, model: str | Path) -> None:
    """Raise SecateurError if a run would write into the folder that it reads, or around it."""
    read = Path(os.path.expanduser(model))
    with writing(output):
        if not read.exists():
            return
        inside, source = output.resolve(), read.resolve()
        if inside == source:
            raise SecateurError(f"The output folder {output} is the model itself; name another.")
        if inside.is_relative_to(source):
            raise SecateurError(f"The output folder {output} lies in the model's; name another.")
        if source.is_relative_to(inside):
            raise SecateurError(f"The model lies in the output folder {output}; name another.")


def check_space(
    output: Path, need: int, present: Iterable[Path] = (), what: str = "The result"
) -> None:
    """Find out now, not hours later, that a result will not fit on the disk.

    Args:
        output: folder that it goes to, which need not exist.
        need: bytes of all files.
        present: those of them that are there already.
        what: needs the space.

    Raises:
        SecateurError: too little is free.
    """
    there = output.resolve()
    while not there.exists():
        there = there.parent
    have = shutil.disk_usage(there).free
    need -= sum(path.stat().st_size for path in present)
    if have < need:
        raise SecateurError(
            f"{what} needs {need / 1e9:.1f} GB and the disk of {output} has {have / 1e9:.1f} GB "
            "free; free some space or choose another disk."
        )


def decides(**parts: Any) -> dict[str, Any]:
    """The fingerprint of a run: what decides its bytes, and the versions that made them."""
    return {**parts, "versions": package_versions()}


def _read_manifest(output: Path, restart: bool = False) -> Manifest:
    path = output / _FOLDER / "manifest.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("schema_version") == _SCHEMA:
            return Manifest.model_validate(values)
        problem = f"The run in {output} was begun by another version of secateur"
    except (ValueError, RecursionError):
        problem = f"{path} is damaged"
    if restart:
        return Manifest(fingerprint={})
    raise SecateurError(f"{problem}; choose another folder, or start over with --restart.")


def _is_ours(path: Path, output: Path) -> bool:
    """Whether a path is left of a run that was killed before it began."""
    inside = path.relative_to(output).parts
    return inside in ((_FOLDER,), (_FOLDER, LOCK)) or (
        len(inside) > 1 and inside[0] == _FOLDER and inside[1] == ".manifest.json.part"
    )


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Name what differs, one level into mappings: ``recipe pattern``, ``model``."""
    changed = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += [
                f"{key} {inner}"
                for inner in sorted(old.keys() | new.keys())
                if old.get(inner) != new.get(inner)
            ]
        elif old != new:
            changed.append(key)
    return changed
