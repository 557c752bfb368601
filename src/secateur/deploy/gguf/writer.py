"""Write a GGUF file, one tensor at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization

from secateur.deploy.gguf.architecture import Architecture, TensorSource
from secateur.deploy.gguf.tokenizer import Vocabulary
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_with
from secateur.runs.progress import Progress

Type = Literal["f32", "f16", "bf16", "q8_0"]
"""How matrices are stored; vectors are float32."""

_QUANTIZATIONS: dict[Type, tuple[Quantization, gguf.LlamaFileType]] = {
    "f32": (Quantization.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Quantization.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Quantization.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Quantization.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def check_type(architecture: Architecture, type: Type) -> None:
    """Raise SecateurError if a row of a matrix does not fit the type."""
    quantization, _ = _QUANTIZATIONS[type]
    width, _ = gguf.GGML_QUANT_SIZES[quantization]
    for tensor in architecture.tensors:
        if len(tensor.shape) > 1 and tensor.shape[-1] % width:
            fitting = [
                name
                for name, (each, _) in _QUANTIZATIONS.items()
                if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[each][0] == 0
            ]
            raise SecateurError(
                f"Rows of {tensor.name} have {tensor.shape[-1]} numbers, and {type} needs a "
                f"multiple of {width}; use --type {', '.join(fitting[:-1])} or {fitting[-1]}."
            )


def write(
    path: Path,
    name: str,
    architecture: Architecture,
    vocabulary: Vocabulary,
    type: Type,
    progress: Progress,
) -> None:
    """Write a model to ``path``, whole or not at all.

    Raises:
        SecateurError: the file cannot be written, or a weight does not fit the type.
    """

    def fill(part: Path) -> None:
        writer = gguf.GGUFWriter(part, architecture.name)
        try:
            _fill(writer, name, architecture, vocabulary, type, progress)
        finally:
            writer.close()
        _check(part, architecture)

    write_with(path, fill)


def _fill(
    writer: gguf.GGUFWriter,
    name: str,
    architecture: Architecture,
    vocabulary: Vocabulary,
    type: Type,
    progress: Progress,
) -> None:
    writer.add_name(name)
    architecture.write_keys(writer)
    vocabulary.write_keys(writer)
    writer.add_file_type(_QUANTIZATIONS[type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in architecture.tensors:
        quantization = _quantization(tensor, type)
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, quantization))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    count = len(architecture.tensors)
    for index, tensor in enumerate(architecture.tensors):
        progress("Writing the GGUF file", index, count)
        values = tensor.read()
        quantization = _quantization(tensor, type)
        if quantization == Quantization.F16 and values.abs().max() > torch.finfo(torch.half).max:
            raise SecateurError(
                f"{tensor.name} holds values beyond what f16 can hold; use --type bf16."
            )
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), quantization))
    progress("Writing the GGUF file", count, count)


def _quantization(tensor: TensorSource, type: Type) -> Quantization:
    return Quantization.F32 if len(tensor.shape) == 1 else _QUANTIZATIONS[type][0]


def _check(path: Path, architecture: Architecture) -> None:
    """Read the file back and hold its tensors against what was meant."""
    found = {each.name: tuple(map(int, each.shape[::-1])) for each in gguf.GGUFReader(path).tensors}
    if found != {each.name: each.shape for each in architecture.tensors}:
        raise SecateurError(f"{path.name} was not written as it should be; report this fault.")
