"""Write a GGUF file, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization

from secateur.deploy.gguf.architecture import Architecture
from secateur.deploy.gguf.quantizer import Quantizer
from secateur.deploy.gguf.tokenizer import Vocabulary
from secateur.deploy.gguf.types import Type, file_type
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_with
from secateur.runs.progress import Progress


def write(
    path: Path,
    name: str,
    architecture: Architecture,
    vocabulary: Vocabulary,
    type: Type,
    types: Mapping[str, Quantization],
    progress: Progress,
) -> None:
    """Write a model to ``path``, whole or not at all.

    Raises:
        SecateurError: the file cannot be written, a weight does not fit the type, or the type
            needs a package that is not installed.
    """
    quantizer = Quantizer(types.values())

    def fill(part: Path) -> None:
        writer = gguf.GGUFWriter(part, architecture.name)
        try:
            _fill(writer, name, architecture, vocabulary, type, types, quantizer, progress)
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
    types: Mapping[str, Quantization],
    quantizer: Quantizer,
    progress: Progress,
) -> None:
    writer.add_name(name)
    architecture.write_keys(writer)
    vocabulary.write_keys(writer)
    writer.add_file_type(file_type(type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in architecture.tensors:
        quantization = types[tensor.name]
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
        quantization = types[tensor.name]
        if quantization == Quantization.F16 and values.abs().max() > torch.finfo(torch.half).max:
            raise SecateurError(
                f"{tensor.name} holds values beyond what f16 can hold; use --type bf16."
            )
        writer.write_tensor_data(quantizer.quantize(values.numpy(), quantization))
    progress("Writing the GGUF file", count, count)


def _check(path: Path, architecture: Architecture) -> None:
    """Read the file back and hold its tensors against what was meant."""
    found = {each.name: tuple(map(int, each.shape[::-1])) for each in gguf.GGUFReader(path).tensors}
    if found != {each.name: each.shape for each in architecture.tensors}:
        raise SecateurError(f"{path.name} was not written as it should be; report this fault.")
