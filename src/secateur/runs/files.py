"""Write files whole or not at all, and make sure of them: modes, sync, digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.runs.errors import SecateurError

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 256
_SAMPLE_BYTES = 65536
# Larger files are known by their size and samples: hashing them would take longer than the work.
_HASHED_BYTES = 1 << 31
# A file is written in a folder of this name beside it, then moved.
_PART = ".{}.part"
_SEAL = "sha256"
_DIGESTS = "digests.json"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, sealed: bool = False) -> None:
    """Write contiguous tensors to ``path``; readers see the whole file or none.

    Args:
        path: the file.
        tensors: by name.
        sealed: put their hash into the file, for ``read_sealed``.

    Raises:
        SecateurError: the file cannot be written.
    """
    # Writing text has to do without torch: secateur.runs.processes says why.
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # One entry: the writer puts several in any order, and files of one content would differ.
    metadata = {_SEAL: _hash_tensors(whole)} if sealed else {"format": "pt"}
    write_with(path, lambda part: save_file(whole, part, metadata=metadata))


def read_sealed(path: Path) -> dict[str, Tensor]:
    """Read tensors that were written sealed.

    Raises:
        SecateurError: they are not those that were written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seal = (file.metadata() or {}).get(_SEAL)
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"{path} is damaged; start over with --restart.") from error
    if seal != _hash_tensors(tensors):
        raise SecateurError(f"{path} is damaged; start over with --restart.")
    return tensors


def write_text(path: Path, text: str) -> None:
    """Write text to ``path``; readers see the whole file or none."""
    write_with(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON to ``path``; readers see the whole file or none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sign(text: str) -> str:
    """Add a line that says who wrote a text, which readers do not see in Markdown."""
    return f"{text}\n<!-- secateur {_digest_of_text(text)} -->\n"


def is_signed(path: Path) -> bool:
    """Whether a file is as ``sign`` left it, so that no one else has written in it."""
    try:
        text, _, line = path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    except (OSError, ValueError):
        return False
    return line == f"<!-- secateur {_digest_of_text(text)} -->"


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes to ``target``; readers see the whole file or none."""
    write_with(target, lambda part: shutil.copyfile(source, part))


def write_with(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file at the path it is given; readers see the whole file or none."""
    # A folder, since the safetensors writer makes files of other names beside its own.
    with _part_beside(path) as part:
        fill(part / path.name)
        move_file(part / path.name, path)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write into a folder; ``path``, which is not there, is all of it or nothing."""
    with _part_beside(path) as part:
        fill(part)
        for file in part.iterdir():
            _sync(file)
        part.replace(path)
        _sync(path.parent)


@contextmanager
def _part_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, for what is not finished; it goes at the end."""
    # A fixed name: what a killed run left behind is removed by the next writer, not collected.
    part = path.with_name(_PART.format(path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(part)
            part.mkdir()
            yield part
        finally:
            remove(part)


def move_file(source: Path, target: Path) -> None:
    """Move a finished file to ``target`` with the modes of the user's umask, and sync it."""
    os.chmod(source, 0o666 & ~_umask())
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def move_folder(source: Path, target: Path) -> None:
    """Move a finished folder to ``target``, which is not there, with digests of its files."""
    files = [path for path in source.rglob("*") if path.is_file() and path.name != _DIGESTS]
    write_json(
        source / _DIGESTS, {str(path.relative_to(source)): digest_of(path) for path in files}
    )
    for path in files:
        _sync(path)
    source.replace(target)
    _sync(target.parent)


def check_folder(folder: Path) -> None:
    """Raise SecateurError if a folder is not as ``move_folder`` left it."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        whole = all(digest_of(folder / name) == each for name, each in digests.items())
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise SecateurError(f"{folder} is damaged; start over with --restart.")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for path in folder.glob(_PART.format("*")):
        remove(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what any writer raises when a file cannot be written into one sentence.

    Raises:
        SecateurError: the system refused, or the disk is full.
    """
    try:
        yield
    except Exception as error:
        # The safetensors writer wraps the system's error in one of its own, as text.
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise SecateurError(
                f"The disk is full while writing {path}; free some space and run the same command "
                "again, what is finished is kept."
            ) from error
        if isinstance(error, OSError):
            raise SecateurError(
                f"{path} cannot be written ({error.strerror or error}); name another place, or "
                "mend its permissions."
            ) from error
        raise


def digest_of(path: Path) -> str:
    """Size and hash of a file; of one over 2 GiB the hash is of its header and of samples."""
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return f"{size}:{fingerprint_files([path])}"
    return f"{size}:{sha256_of(path)}"


def sha256_of(path: Path) -> str:
    """Hash of a whole file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
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


def cache_folder() -> Path:
    """What can be made again: converted checkpoints, tokens of texts, files of the demo.

    ``SECATEUR_CACHE`` names it; else it is ``secateur`` in the user's cache folder.
    """
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "secateur"


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
