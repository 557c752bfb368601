"""Read tensors of a Hugging Face checkpoint folder, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.models.formats.packed import PACKED, PIECES, SCALE, SHAPE, packed_bits, unpack
from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class CheckpointReader:
    """The tensors of a safetensors checkpoint, by name.

    All headers are checked when the reader is made, so a missing or truncated file is found
    before work starts. No file stays mapped between calls of ``read``: pages that were read leave
    the resident memory again. Packed weights appear under the names and shapes, and in the dtype,
    of the weights that they stand for.

    Attributes:
        folder: the checkpoint folder.
        files: file name of every tensor.
        shapes: shape of every tensor.
        dtypes: dtype of every tensor.
        homes: file name of every tensor by its name in the files, packed weights in parts.

    Raises:
        SecateurError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        listed = _listed_tensors(folder)
        for file in sorted(set(listed.values())) if listed else [_SINGLE]:
            self._read_header(file)
        for name, file in (listed or {}).items():
            if self.files.get(name) != file:
                raise SecateurError(
                    f"{folder / file} lacks the tensor {name} that {_INDEX} lists in it; "
                    "fetch the checkpoint again."
                )
        self._show_packed(_bits_of(folder))

    @classmethod
    def of_file(cls, path: Path, bits: int | None = None) -> CheckpointReader:
        """A reader of one safetensors file, whatever else lies in its folder.

        Args:
            path: the file.
            bits: of its packed weights, if it has any.
        """
        reader = cls.__new__(cls)
        reader.folder, reader.files, reader.shapes, reader.dtypes = path.parent, {}, {}, {}
        reader._read_header(path.name)
        reader._show_packed(bits)
        return reader

    def _show_packed(self, bits: int | None) -> None:
        """Show packed weights instead of the tensors they are stored as."""
        self._bits = bits
        self.homes = dict(self.files)
        self._packed: dict[str, dict[str, str]] = {}
        self._sizes = {
            name: self.dtypes[name].itemsize * torch.Size(shape).numel()
            for name, shape in self.shapes.items()
        }
        for packed in [name for name in self.homes if name.endswith(f".{PACKED}")]:
            if bits is None:
                continue
            prefix = packed.removesuffix(PACKED)
            pieces = {piece: prefix + piece for piece in PIECES if prefix + piece in self.homes}
            weight = f"{prefix}weight"
            shape = self._stored([pieces[SHAPE]])[pieces[SHAPE]]
            self._packed[weight] = pieces
            self._sizes[weight] = sum(self._sizes[name] for name in pieces.values())
            self.files[weight] = self.files[packed]
            self.shapes[weight] = tuple(shape.tolist())
            self.dtypes[weight] = self.dtypes[pieces[SCALE]]
            for name in pieces.values():
                del self.files[name], self.shapes[name], self.dtypes[name]

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise SecateurError(
                f"{path} is missing; a checkpoint folder with safetensors files was expected."
            )
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(name)
                    self.files[name] = file
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _DTYPES.get(part.get_dtype(), torch.uint8)
        except SafetensorError as error:
            raise SecateurError(
                f"{path} is truncated or no safetensors file ({error}); fetch it again."
            ) from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the named tensors in the dtype of the file, on the CPU."""
        names = list(names)
        stored = self._stored(
            piece for name in names for piece in self._packed.get(name, {"": name}).values()
        )
        return {name: self._shown(name, stored) for name in names}

    def mapped(self, name: str) -> Tensor:
        """Return the named tensor itself; its file is mapped for as long as the tensor lives.

        A packed weight is unpacked into memory.
        """
        if name in self._packed:
            return self.read([name])[name]
        with safe_open(self.folder / self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """Hash the configuration and the weights as ``fingerprint_files`` does."""
        files = sorted(set(self.files.values()))
        return fingerprint_files([self.folder / file for file in ["config.json", *files]])

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of the named tensors on disk."""
        return sum(self._sizes[name] for name in names)

    def _shown(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        if name not in self._packed:
            return stored[name]
        assert self._bits is not None
        pieces = {piece: stored.pop(full) for piece, full in self._packed[name].items()}
        return unpack(pieces, self._bits)

    def _stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of tensors by the names they have in the files."""
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            opened = {}
            for name in names:
                file = self.homes[name]
                if file not in opened:
                    opened[file] = stack.enter_context(
                        safe_open(self.folder / file, framework="pt")
                    )
                # What get_tensor returns maps the file; a copy lets the mapping go.
                tensors[name] = opened[file].get_tensor(name).clone()
        return tensors


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _bits_of(folder: Path) -> int | None:
    """Bits of packed weights, as the configuration beside the files has it."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SecateurError(f"{path} is not valid JSON; fetch the checkpoint again.") from error
    return packed_bits(config.get("quantization_config") or {})


def _listed_tensors(folder: Path) -> dict[str, str] | None:
    """The index of a sharded checkpoint, with every file name kept inside the folder."""
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        listed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise SecateurError(f"{path} is no index of a checkpoint; fetch it again.") from error
    for file in set(listed.values()):
        if Path(file).name != file:
            raise SecateurError(
                f"{path} names the file {file} outside its own folder; "
                "use a checkpoint from a source you trust."
            )
    return listed
