"""What a checkpoint says of itself, for work that looks at no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import parse_safetensors_file_metadata
from huggingface_hub.errors import EntryNotFoundError

from secateur.models.files import SINGLE, read_index
from secateur.models.gguf import describe
from secateur.models.locate import fetch_side_files, find_folder, no_safetensors
from secateur.runs.errors import SecateurError, explained

_GGUF_DTYPE = "F32"
_GGUF_BYTES = 4


@contextmanager
def headers_of(name: str | Path) -> Iterator[Path]:
    """Give a checkpoint folder whose configuration and headers are those of a model.

    What is in a folder already is used as it lies there. Of a model on the hub, the side files and
    the headers are fetched; a GGUF file is not converted. Their weights are holes in files, which
    take no room on the disk and read as zeros. The folder goes at the end of the context.

    Args:
        name: folder, name on the hub or GGUF file.

    Raises:
        SecateurError: nothing of that name, or it cannot be read.
    """
    path = Path(name).expanduser()
    is_gguf = path.suffix == ".gguf"
    if not is_gguf and path.exists():
        yield find_folder(name)
        return
    with TemporaryDirectory(prefix="secateur-") as temporary:
        # Messages name the folder.
        folder = Path(temporary) / (path.stem if is_gguf else path.name)
        if is_gguf:
            _describe_gguf(path, folder)
            yield folder
        else:
            yield _fetch_headers(str(name), folder)


def _fetch_headers(name: str, folder: Path) -> Path:
    """Make the folder of a model on the hub; give that in the cache if its weights are there."""
    cached = fetch_side_files(name)
    files = sorted(set(read_index(cached).values())) or [SINGLE]
    if all((cached / file).is_file() for file in files):
        return cached
    shutil.copytree(cached, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in files:
        _write_hollow(folder / file, _remote_header(name, file, cached.name))
    return folder


def _remote_header(name: str, file: str, revision: str) -> dict[str, dict[str, Any]]:
    with explained(
        f"The header of {file} of {name} could not be fetched from the hub",
        "check the name, the network and your access.",
    ):
        try:
            found = parse_safetensors_file_metadata(name, file, revision=revision)
        except EntryNotFoundError as error:
            raise no_safetensors(name) from error
    return {
        key: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": tensor.data_offsets,
        }
        for key, tensor in found.tensors.items()
    }


def _describe_gguf(path: Path, folder: Path) -> None:
    tensors, end = {}, 0
    folder.mkdir()
    for name, shape in describe(path, folder).items():
        start, end = end, end + _GGUF_BYTES * shape.numel()
        tensors[name] = {"dtype": _GGUF_DTYPE, "shape": shape, "data_offsets": (start, end)}
    _write_hollow(folder / SINGLE, tensors)


def _write_hollow(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a safetensors file that has a header, and a hole in place of the weights."""
    header = json.dumps(tensors).encode()
    end = max((each["data_offsets"][1] for each in tensors.values()), default=0)
    try:
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
    except OSError as error:
        raise SecateurError(
            f"A file of {end / 1e9:.1f} GB with nothing in it cannot be made in {path.parent} "
            f"({error.strerror}); set TMPDIR to a folder on another disk."
        ) from error
