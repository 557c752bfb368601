"""Write files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.runs.errors import SecateurError

if TYPE_CHECKING:
    from torch import Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors to ``path``; readers see the whole file or none.

    Raises:
        SecateurError: the disk is full.
    """
    # Writing text has to do without torch: secateur.runs.processes says why.
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    _write(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    """Write text to ``path``; readers see the whole file or none."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON to ``path``; readers see the whole file or none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes to ``target``; readers see the whole file or none."""
    _write(target, lambda temporary: temporary.write_bytes(source.read_bytes()))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed temporary name: what a killed run left behind is overwritten, not collected.
    temporary = path.with_name(f".{path.name}.part")
    with full_disk_explained(path):
        try:
            fill(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" from any writer into a sentence that says what to do."""
    try:
        yield
    except Exception as error:
        # The safetensors writer wraps the system's error in one of its own, as text.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise SecateurError(
                f"The disk is full while writing {path}; free some space and run the same command "
                "again, what is finished is kept."
            ) from error
        raise


def cache_folder() -> Path:
    """What can be made again: converted checkpoints, tokens of texts, files of the demo.

    ``SECATEUR_CACHE`` names it; else it is ``secateur`` in the user's cache folder.
    """
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "secateur"
