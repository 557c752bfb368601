"""How each tensor of a GGUF file is stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import gguf
from gguf import GGMLQuantizationType as Quantization

from secateur.deploy.gguf.architecture import TensorSource
from secateur.runs.errors import SecateurError

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
"""How matrices are stored; vectors are float32."""

_WHOLE: dict[str, Quantization] = {
    "f32": Quantization.F32,
    "f16": Quantization.F16,
    "bf16": Quantization.BF16,
    "q8_0": Quantization.Q8_0,
    "q6_k": Quantization.Q6_K,
}
# Most matrices are in the first; those that lose most are in six bits.
_MIXED: dict[str, Quantization] = {"q4_k_m": Quantization.Q4_K, "q5_k_m": Quantization.Q5_K}
_FILE_TYPES: dict[str, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
# What llama.cpp takes for rows that are no multiple of 256.
_NARROW: dict[Quantization, Quantization] = {
    Quantization.Q4_K: Quantization.Q5_0,
    Quantization.Q5_K: Quantization.Q5_1,
    Quantization.Q6_K: Quantization.Q8_0,
}
_SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


def file_type(type: Type) -> gguf.LlamaFileType:
    """What the header says of the file as a whole."""
    return _FILE_TYPES[type]


def choose_types(
    tensors: Sequence[TensorSource], blocks: int, type: Type
) -> dict[str, Quantization]:
    """The type of each tensor by name.

    The mixes are those of llama.cpp: six bits for the output matrix, and for values and the last
    matrix of the feed-forward in the outer blocks and in every third of the others.

    Args:
        tensors: of the file.
        blocks: of the model.
        type: what the user named.

    Raises:
        SecateurError: a row does not fit.
    """
    names = {tensor.name for tensor in tensors}
    output = "output.weight" if "output.weight" in names else "token_embd.weight"
    chosen: dict[str, Quantization] = {}
    for tensor in tensors:
        if len(tensor.shape) == 1:
            chosen[tensor.name] = Quantization.F32
            continue
        wanted = _WHOLE.get(type)
        if wanted is None:
            more = tensor.name == output or _takes_more(tensor.name, blocks)
            wanted = Quantization.Q6_K if more else _MIXED[type]
        width = tensor.shape[-1]
        if width % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = _NARROW.get(wanted, wanted)
        _check_width(tensor, wanted, type)
        chosen[tensor.name] = wanted
    return chosen


def note_on_types(chosen: Mapping[str, Quantization], type: Type) -> str | None:
    """Say how many matrices are stored larger than meant, None if none is."""
    narrow = Counter(
        quantization.name.lower()
        for quantization in chosen.values()
        if type not in ("q8_0",) and quantization in _NARROW.values()
    )
    if not narrow:
        return None
    matrices = sum(quantization != Quantization.F32 for quantization in chosen.values())
    kinds = " and ".join(f"{count} as {name}" for name, count in sorted(narrow.items()))
    return (
        f"{sum(narrow.values())} of {matrices} matrices have rows that are no multiple of 256, "
        f"which {type} needs: {kinds}, which are larger."
    )


def _takes_more(name: str, blocks: int) -> bool:
    found = _SENSITIVE.fullmatch(name)
    if found is None:
        return False
    index, eighth = int(found[1]), blocks // 8
    return index < eighth or index >= 7 * blocks // 8 or (index - eighth) % 3 == 2


def _check_width(tensor: TensorSource, wanted: Quantization, type: Type) -> None:
    width, needed = tensor.shape[-1], gguf.GGML_QUANT_SIZES[wanted][0]
    if width % needed == 0:
        return
    fitting = [
        name
        for name, each in _WHOLE.items()
        if width % gguf.GGML_QUANT_SIZES[_NARROW.get(each, each)][0] == 0
    ]
    raise SecateurError(
        f"Rows of {tensor.name} have {width} numbers, and {type} needs a multiple of {needed}; use "
        f"--type {', '.join(fitting[:-1])} or {fitting[-1]}."
    )
