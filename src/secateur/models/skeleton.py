"""A model without weights, and which tensor of the file belongs where in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secateur.models.locate import load_config
from secateur.models.reader import CheckpointReader
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError


def build_skeleton(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    packed: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the checkpoint's model with parameters on the meta device and real buffers.

    Args:
        folder: the checkpoint.
        trust_remote_code: let the checkpoint's own Python code run.
        packed: weights may be packed; the model is that of the unpacked ones.
        dtype: the model is to be loaded in; the checkpoint's own if None.

    Raises:
        SecateurError: the configuration is not that of a causal language model.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, packed=packed)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Buffers such as embedding scales are rounded to the model's dtype, as they are on loading.
    loaded = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=loaded
        )
    model.eval()
    return model


@dataclass(frozen=True)
class TensorMap:
    """Names in the file of the tensors that the block walk needs.

    Attributes:
        blocks: for each block, parameter name inside the block -> name in the file.
        outside: parameter name in the base model, outside the blocks -> name in the file.
        head: parameter name in the model, outside the base model -> name in the file; a head that
            is tied to the embeddings is not among them.
        rest: names in the file that belong to no block; the head is among them.
    """

    blocks: list[dict[str, str]]
    outside: dict[str, str]
    head: dict[str, str]
    rest: list[str]


def map_tensors(blocks: BlockList, reader: CheckpointReader) -> TensorMap | str:
    """Match parameters and file tensors one to one, or say in a phrase why that fails.

    Raises:
        SecateurError: a tensor has another shape than the configuration asks for.
    """
    model = blocks.model
    transforms = get_model_conversion_mapping(model)
    for transform in transforms:
        if isinstance(transform, WeightConverter):
            for name in reader.files:
                if transform.rename_source_key(name)[1] is not None:
                    return f"{name} is stored apart and joined with others on loading"

    base = model.base_model
    base_prefix = f"{model.base_model_prefix}." if base is not model else ""

    def in_file(name: str) -> str | None:
        for candidate in (name, name.removeprefix(base_prefix), base_prefix + name):
            if candidate in reader.files:
                return candidate
        return None

    in_blocks: list[dict[str, str]] = []
    outside: dict[str, str] = {}
    for index, block in enumerate(blocks):
        prefix = blocks.name(index)
        names: dict[str, str] = {}
        for name, parameter in _tensors_of(block):
            found = in_file(f"{prefix}.{name}")
            if found is None:
                return f"{prefix}.{name} is not in the files under that name"
            _check_shape(reader, found, tuple(parameter.shape))
            names[name] = found
        in_blocks.append(names)
    for name, parameter in base.named_parameters():
        full = base_prefix + name
        if full.startswith(f"{blocks.prefix}."):
            continue
        found = in_file(full)
        if found is None:
            return f"{full} is not in the files under that name"
        _check_shape(reader, found, tuple(parameter.shape))
        outside[name] = found

    own_names = {name for name, _ in model.named_parameters()} - {
        base_prefix + name for name, _ in base.named_parameters()
    }
    used = {file_name for names in in_blocks for file_name in names.values()}
    rest = [name for name in reader.files if name not in used]
    head = {}
    for name in rest:
        # Some heads have another name in the file than in the model.
        renamed = name
        for transform in transforms:
            renamed, _ = transform.rename_source_key(renamed)
        if renamed in own_names:
            head[renamed] = name
    return TensorMap(in_blocks, outside, head, rest)


def _tensors_of(block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint holds of a block."""
    return list(block.state_dict().items())


def _check_shape(reader: CheckpointReader, name: str, expected: tuple[int, ...]) -> None:
    if reader.shapes[name] != expected:
        raise SecateurError(
            f"{name} in {reader.folder} has shape {list(reader.shapes[name])} where config.json "
            f"asks for {list(expected)}; the configuration and the weights do not belong together."
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """Largest number of positions the model was made for, None if it has no bound."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    return int(positions) if positions else None


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Raise SecateurError if calibration windows are longer than the model's positions."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise SecateurError(
            f"Calibration windows of {length} tokens are longer than the model's {positions} "
            f"positions; give --length {positions} or less."
        )
