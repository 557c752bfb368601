"""Read tensors of a Hugging Face checkpoint folder, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.models.files import INDEX, WeightFiles, find_weights
from secateur.models.formats.format import Stored, WeightFormat, find_format, recognise
from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files
from secateur.runs.reading import read_json_object

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


class CheckpointReader:
    """The tensors of a safetensors checkpoint, by name.

    All headers are checked when the reader is made, so a missing or truncated file is found
    before work starts. No file stays mapped between calls of ``read``: pages that were read leave
    the resident memory again. Whatever the format of the weights, they appear under the names and
    shapes, and in the dtype, that they have when they are decoded.

    Args:
        folder: the checkpoint folder.
        files: names of the files to read; all of the checkpoint if None.
        format: of the linears; what the configuration says if None.
        cast: dtype in which tensors are shown that have the dtype of most numbers; those that the
            files hold in another one on purpose keep it. None shows all as they are.

    Attributes:
        files: file name of every tensor.
        shapes: shape of every tensor.
        dtypes: dtype of every tensor.
        homes: file name of every tensor by its name in the files.
        cast: as given.

    Raises:
        SecateurError: a file is missing, truncated or not safetensors, or tensors of a weight are
            missing or do not fit each other.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str] | None = None,
        format: WeightFormat | None = None,
        cast: torch.dtype | None = None,
    ) -> None:
        self.folder = folder
        self.cast = cast
        self.homes: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}
        weights = WeightFiles(list(files)) if files is not None else find_weights(folder)
        for file in weights.names:
            self._read_header(file)
        for name, file in weights.listed.items():
            if self.homes.get(name) != file:
                raise SecateurError(
                    f"{folder / file} lacks the tensor {name} that {INDEX} lists in it; "
                    "fetch the checkpoint again."
                )
        described = self.config.get("quantization_config") if format is None else None
        # Tensors of a format that is not known are shown as they are stored.
        self._format = format or recognise(described) or find_format("plain").of(None)
        self._parts = self._format.find(self.homes)
        shown = self._shown()
        self.shapes = {name: each.shape for name, each in shown.items()}
        self.dtypes = {name: each.dtype for name, each in shown.items()}
        self.files = {name: self.homes[self._names(name)[0]] for name in shown}
        if cast is not None:
            common = self._common_dtype()
            self.dtypes |= {name: cast for name, each in self.dtypes.items() if each == common}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says, empty if there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        return read_json_object(path, "The configuration", "fetch the checkpoint again.")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the named tensors in the dtype of the file, on the CPU."""
        with self._opened() as tensor:
            # What is opened maps the file; a copy lets the mapping go.
            return {name: self._decoded(name, lambda part: tensor(part).clone()) for name in names}

    def mapped(self, name: str) -> Tensor:
        """Return the named tensor itself; its file is mapped for as long as the tensor lives.

        A weight that has to be decoded is decoded into memory.
        """
        with self._opened() as tensor:
            return self._decoded(name, tensor)

    def fingerprint(self) -> str:
        """Hash the configuration and the weights as ``fingerprint_files`` does."""
        files = sorted(set(self.homes.values()))
        return fingerprint_files([self.folder / file for file in ["config.json", *files]])

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of the named tensors on disk, of those that are cast as they will be."""
        return sum(self._bytes_of(name) for name in names)

    def _bytes_of(self, name: str) -> int:
        if self.cast is not None and name not in self._parts:
            return Stored(self.shapes[name], self.dtypes[name]).nbytes
        return sum(self._stored[part].nbytes for part in self._names(name))

    def _common_dtype(self) -> torch.dtype:
        """The floating dtype of most numbers."""
        totals = {dtype: 0 for dtype in self.dtypes.values() if dtype.is_floating_point}
        for name, dtype in self.dtypes.items():
            if dtype in totals:
                totals[dtype] += math.prod(self.shapes[name])
        return max(totals, key=totals.__getitem__, default=torch.float32)

    def _names(self, name: str) -> list[str]:
        """Names in the files of what a tensor consists of."""
        return list(self._parts[name].values()) if name in self._parts else [name]

    def _decoded(self, name: str, tensor: Callable[[str], Tensor]) -> Tensor:
        if name not in self._parts:
            return self._cast(name, tensor(name))
        pieces = {piece: tensor(part) for piece, part in self._parts[name].items()}
        with self._damage_explained(name):
            return self._cast(name, self._format.decode(pieces))

    def _cast(self, name: str, stored: Tensor) -> Tensor:
        found = stored.to(self.dtypes[name])
        if found.dtype == torch.float16 != stored.dtype and not bool(found.isfinite().all()):
            raise SecateurError(
                f"{name} in {self.folder} holds values beyond what float16 can hold; save in "
                "bfloat16 or as the source."
            )
        return found

    def _shown(self) -> dict[str, Stored]:
        """Every tensor, a decoded weight in place of its parts."""
        hidden = {part for parts in self._parts.values() for part in parts.values()}
        shown = {name: each for name, each in self._stored.items() if name not in hidden}
        with self._opened() as tensor:
            for name, parts in self._parts.items():
                stored = {piece: self._stored[part] for piece, part in parts.items()}

                def read(piece: str, parts: Mapping[str, str] = parts) -> Tensor:
                    return tensor(parts[piece])

                with self._damage_explained(name):
                    shown[name] = self._format.weight(stored, read)
        return shown

    @contextmanager
    def _damage_explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise SecateurError(
                f"The weight {name} in {self.folder} cannot be read, {error}; fetch or make the "
                "checkpoint again."
            ) from error

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
                    dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                    if name in self.homes:
                        raise SecateurError(
                            f"The tensor {name} is both in {self.homes[name]} and in {file} of "
                            f"{self.folder}; fetch the checkpoint again."
                        )
                    self.homes[name] = file
                    self._stored[name] = Stored(tuple(part.get_shape()), dtype)
        except OSError as error:
            raise SecateurError(
                f"{path} cannot be opened; check its permissions, and fetch it again if need be."
            ) from error
        except SafetensorError as error:
            raise SecateurError(
                f"{path} is truncated or no safetensors file ({error}); fetch it again."
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[Callable[[str], Tensor]]:
        """Within the context, give mapped tensors by the names they have in the files."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def tensor(name: str) -> Tensor:
                file = self.homes[name]
                if file not in opened:
                    opened[file] = stack.enter_context(
                        safe_open(self.folder / file, framework="pt")
                    )
                found: Tensor = opened[file].get_tensor(name)
                return found

            yield tensor
