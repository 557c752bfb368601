"""The output folder of a run: whose it is, what is finished, what may be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.runs.files import write_json
from secateur.runs.errors import SecateurError

# What runs write beside the checkpoint.
_RESULTS = ("report.json", "plan.json", "curve.json", "curve.svg")
_SAMPLES = 256
_SAMPLE_BYTES = 65536


@dataclass
class Run:
    """A run's manifest, kept in ``OUTPUT/secateur/manifest.json``.

    Attributes:
        output: the folder the checkpoint is written to.
        fingerprint: everything that decides the bytes of the result.
        finished: what the report says of each finished block, in block order.
        calibration: what the report says of the calibration text, once it was drawn.
        complete: the checkpoint is whole.
    """

    output: Path
    fingerprint: dict[str, Any]
    finished: list[dict[str, Any]]
    calibration: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def folder(self) -> Path:
        """Where everything is kept that is not the checkpoint itself."""
        return self.output / "secateur"

    @classmethod
    def open(cls, output: Path, fingerprint: dict[str, Any], *, restart: bool) -> Run:
        """Start a run in an empty or new folder, or go on with an interrupted one.

        Raises:
            SecateurError: the folder holds something else, or a run of other things.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        run = cls(output, fingerprint, [])
        if output.exists() and not output.is_dir():
            raise SecateurError(f"The output {output} is a file; name a new or empty folder.")
        if not output.is_dir() or not any(output.iterdir()):
            output.mkdir(parents=True, exist_ok=True)
        elif not run._manifest.is_file():
            raise SecateurError(
                f"The output folder {output} holds something that is not an interrupted run; "
                "name a new or empty folder."
            )
        elif restart:
            run._clear()
        else:
            saved = json.loads(run._manifest.read_text(encoding="utf-8"))
            changed = _differences(saved["fingerprint"], fingerprint)
            if changed:
                raise SecateurError(
                    f"{output} was begun with another {', '.join(changed)}; run it as it was "
                    "begun, choose another folder, or start over with --restart."
                )
            run.finished, run.complete = saved["finished"], saved["complete"]
            run.calibration = saved["calibration"]
        run._write()
        return run

    def record_calibration(self, description: dict[str, Any]) -> None:
        """Note that the calibration tokens are on disk."""
        self.calibration = description
        self._write()

    def record(self, block: dict[str, Any]) -> None:
        """Note that the next block is on disk."""
        self.finished.append(block)
        self._write()

    def record_complete(self) -> None:
        """Note that the checkpoint is whole."""
        self.complete = True
        self._write()

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    def _write(self) -> None:
        write_json(
            self._manifest,
            {
                "fingerprint": self.fingerprint,
                "calibration": self.calibration,
                "complete": self.complete,
                "finished": self.finished,
            },
        )

    def _clear(self) -> None:
        """Remove what runs write into this folder, and nothing else."""
        files = [*self.output.glob("model*.safetensors*")]
        others = [self.output / name for name in _RESULTS]
        for path in [*files, *others]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


def check_apart(output: Path, model: Path) -> None:
    """Raise SecateurError if a run would write into the folder that it reads."""
    if output.resolve() == model.resolve():
        raise SecateurError(f"The output folder {output} is the model itself; name another.")


def fingerprint_files(paths: list[Path]) -> str:
    """Hash names, sizes and evenly spread samples of the files' bytes.

    Reading hundreds of gigabytes to begin a run would take longer than pruning a block; the
    samples cover the header and every region of each file.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
