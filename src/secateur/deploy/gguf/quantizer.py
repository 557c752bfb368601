"""Quantise matrices for GGUF: by the package ``gguf``, and of K-quants by llama.cpp itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from numpy.typing import NDArray

from secateur.runs.errors import SecateurError

# The package reads these and writes none of them.
_K_QUANTS = (Quantization.Q4_K, Quantization.Q5_K, Quantization.Q6_K)
# Root of the mean squared error over that of the weights; four bits leave about 0.07.
_LARGEST_ERROR = 0.2


class Quantizer:
    """Turns rows of numbers into bytes of a file.

    Raises:
        SecateurError: a type needs llama.cpp, and no package here brings it.
    """

    def __init__(self, types: Iterable[Quantization]) -> None:
        needed = sorted({each.name.lower() for each in types if each in _K_QUANTS})
        self._library = _llama_cpp(needed[0]) if needed else None
        self._checked: set[Quantization] = set()

    def quantize(self, values: NDArray[np.float32], type: Quantization) -> NDArray[Any]:
        """Return the bytes of a float32 matrix (rows, width).

        Raises:
            SecateurError: what llama.cpp made of it is not the matrix.
        """
        if type not in _K_QUANTS:
            made: NDArray[Any] = gguf.quants.quantize(values, type)
            return made
        assert self._library is not None, "the types were named"
        values = np.ascontiguousarray(values, dtype=np.float32)
        rows, width = values.reshape(-1, values.shape[-1]).shape
        out = np.empty(gguf.quant_shape_to_byte_shape(values.shape, type), dtype=np.uint8)
        written = self._library.ggml_quantize_chunk(
            int(type), values.ctypes.data, out.ctypes.data, 0, rows, width, None
        )
        if written != out.nbytes or not self._is_close(values, out, type):
            raise SecateurError(
                f"The llama.cpp of the installed xllamacpp does not write {type.name.lower()} as "
                "expected; export f16, and quantise the file with llama-quantize."
            )
        return out

    def _is_close(self, values: NDArray[np.float32], out: NDArray[Any], type: Quantization) -> bool:
        """Whether a matrix reads back as itself; the first of each type is looked at."""
        if type in self._checked:
            return True
        self._checked.add(type)
        error = np.square(gguf.quants.dequantize(out, type) - values).mean()
        return bool(error <= _LARGEST_ERROR**2 * np.square(values).mean())


def _llama_cpp(type: str) -> Any:
    """The library of llama.cpp that the package xllamacpp carries."""
    found = find_spec("xllamacpp")
    folders = (
        [] if found is None else [Path(each) for each in found.submodule_search_locations or ()]
    )
    files = [file for folder in folders for file in sorted(folder.glob("*.so"))]
    for file in files:
        library = ctypes.CDLL(str(file))
        if hasattr(library, "ggml_quantize_chunk"):
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_void_p,
            ]
            return library
    raise SecateurError(
        f"The type {type} is written by llama.cpp, which no package here brings; install "
        "secateur[llama], or export f16 and quantise the file with llama-quantize."
    )
