"""Write a trained model as an ordinary checkpoint, in the form of the one it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.architecture import BlockList
from secateur.checkpoint.files import write_json, write_safetensors
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.skeleton import TensorMap
from secateur.checkpoint.streamed import StreamedStore
from secateur.training.low_rank import LowRank, adapter_files
from secateur.training.masked_linear import MaskedLinear

ADAPTER = "low-rank"


def file_names(blocks: BlockList, reader: CheckpointReader, tensors: TensorMap) -> dict[str, str]:
    """Name in the file -> name in the model's state, of every tensor the model has."""
    state = blocks.model.state_dict()
    base = blocks.model.base_model
    prefix = f"{blocks.model.base_model_prefix}." if base is not blocks.model else ""
    names = {file: file for file in reader.files if file in state}
    for index, block in enumerate(tensors.blocks):
        names |= {file: f"{blocks.name(index)}.{name}" for name, file in block.items()}
    names |= {file: prefix + name for name, file in tensors.outside.items()}
    return names | {file: name for name, file in tensors.head.items()}


@torch.no_grad()
def round_to_stored(blocks: BlockList, reader: CheckpointReader, names: Mapping[str, str]) -> None:
    """Round every weight to the dtype it is stored in, so that what is evaluated is the file."""
    state = blocks.model.state_dict()
    for file, name in names.items():
        state[name].copy_(state[name].to(reader.dtypes[file]))


def save(
    blocks: BlockList,
    reader: CheckpointReader,
    tensors: TensorMap,
    names: Mapping[str, str],
    linears: Sequence[MaskedLinear],
    output: Path,
) -> None:
    """Write shards, masks, side files and the index, in this order; the index makes it whole."""
    boosts = {each.name: each.low_rank for each in linears if each.low_rank is not None}
    if boosts:
        save_adapter(output / ADAPTER, boosts)
    store = StreamedStore(blocks, reader, tensors, output, blocks.model.device)
    masks = {each.name: each.mask_OI for each in linears}
    for index in range(len(blocks)):
        prefix = f"{blocks.name(index)}."
        store.save(
            index, {n.removeprefix(prefix): m for n, m in masks.items() if n.startswith(prefix)}
        )
    state = blocks.model.state_dict()
    rest: dict[str, Tensor] = {
        file: state[names[file]].to(reader.dtypes[file]) for file in tensors.rest if file in names
    }
    store.finish(rest)


def save_adapter(folder: Path, boosts: Mapping[str, LowRank]) -> None:
    """Write low-rank products as a LoRA adapter."""
    config, adapter = adapter_files(boosts)
    write_safetensors(folder / "adapter_model.safetensors", adapter)
    write_json(folder / "adapter_config.json", config)
