"""What the header of a GGUF file says, without its tensors and without its lists of words."""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    LlamaFileType,
)

from secateur.runs.errors import SecateurError, explained

_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_WORDS = "tokenizer.ggml.tokens"
# A header that counts more is damaged.
_MOST = 1 << 26

Value = int | float | bool | str | list[int | float | bool]


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        values: single values and lists of numbers, by their full keys.
        vocabulary: number of tokens.
        form: the type of most of its weights, as llama.cpp calls it.
        parameters: numbers in its tensors.
    """

    values: dict[str, Value]
    vocabulary: int
    form: str
    parameters: int

    def number(self, key: str) -> int:
        """A count of the architecture, the largest where blocks differ; 0 if it is not said."""
        found = self.values.get(f"{self.values.get('general.architecture')}.{key}", 0)
        counts = found if isinstance(found, list) else [found]
        return max((int(each) for each in counts if isinstance(each, int)), default=0)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and hold the file's size against it.

    Raises:
        SecateurError: there is no such file, or it is no GGUF file, cut short or damaged.
    """
    if not path.is_file():
        raise SecateurError(f"There is no file {path}; check the path.")
    with (
        explained(f"{path} cannot be read as GGUF", "fetch or make it again."),
        path.open("rb") as file,
    ):
        if file.read(4) != b"GGUF":
            raise SecateurError(f"{path} is no GGUF file; name one, or a checkpoint folder.")
        return _read(file, path.stat().st_size)


def _read(file: BinaryIO, size: int) -> GgufHeader:
    version, tensors, entries = _numbers(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    values: dict[str, Value] = {}
    words = 0
    for _ in range(_counted(entries)):
        key = _text(file)
        value, count = _value(file, GGUFValueType(_numbers(file, "I")[0]))
        if value is not None:
            values[key] = value
        if key == _WORDS:
            words = count
    weights: Counter[GGMLQuantizationType] = Counter()
    end = 0
    for _ in range(_counted(tensors)):
        _text(file)
        shape = _numbers(file, f"{_counted(_numbers(file, 'I')[0])}Q")
        kind, offset = _numbers(file, "IQ")
        quantised = GGMLQuantizationType(kind)
        block, bytes_of_block = GGML_QUANT_SIZES[quantised]
        end = max(end, offset + math.prod(shape) // block * bytes_of_block)
        weights[quantised] += math.prod(shape)
    found = values.get("general.alignment")
    alignment = found if isinstance(found, int) and found > 0 else GGUF_DEFAULT_ALIGNMENT
    end += -(-file.tell() // alignment) * alignment
    if size < end:
        raise ValueError(f"it has {size:,} bytes, and its tensors end at {end:,}")
    if not weights:
        raise ValueError("it has no tensors")
    return GgufHeader(values, words, _form(values, weights), weights.total())


def _form(values: dict[str, Value], weights: Counter[GGMLQuantizationType]) -> str:
    said = values.get("general.file_type")
    if isinstance(said, int) and said in set(LlamaFileType):
        return LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return weights.most_common(1)[0][0].name


def _value(file: BinaryIO, kind: GGUFValueType) -> tuple[Value | None, int]:
    """A value and how many it is; None for lists of words, which are only counted."""
    if kind is GGUFValueType.STRING:
        return _text(file), 1
    if kind is not GGUFValueType.ARRAY:
        return _numbers(file, _NUMBERS[kind])[0], 1
    inner, count = _numbers(file, "IQ")
    count = _counted(count)
    if inner == GGUFValueType.STRING:
        for _ in range(count):
            file.seek(_counted(_numbers(file, "Q")[0]), 1)
        return None, count
    return list(_numbers(file, f"{count}{_NUMBERS[GGUFValueType(inner)]}")), count


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    packed = struct.Struct("<" + form)
    return packed.unpack(file.read(packed.size))


def _text(file: BinaryIO) -> str:
    return file.read(_counted(_numbers(file, "Q")[0])).decode("utf-8", errors="replace")


def _counted(count: int) -> int:
    if count > _MOST:
        raise ValueError("it counts more than a file can hold")
    return count
