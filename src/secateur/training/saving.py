"""Write a trained model as an ordinary checkpoint, in the form of the one it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.store import least_precise
from secateur.models.streamed import StreamedStore
from secateur.models.structure import BlockList
from secateur.runs.files import write_json, write_safetensors
from secateur.training.holding import Holding
from secateur.training.low_rank import SLoRB
from secateur.training.masked_linear import MaskedLinear
from secateur.training.ranks import ALONE, Ranks

ADAPTER = "low-rank"


@torch.no_grad()
def round_to_stored(blocks: BlockList, checkpoint: Checkpoint) -> None:
    """Round every weight to the dtype it is stored in, so that what is evaluated is the file."""
    tensors, dtypes = checkpoint.tensors, checkpoint.reader.dtypes
    model = blocks.model
    for module, part in [
        *zip(blocks, tensors.blocks, strict=True),
        (model.base_model, tensors.outside),
        (model, tensors.head),
    ]:
        state = module.state_dict()
        for name in part.names:
            if state[name].is_floating_point():
                dtype = least_precise(dtypes[file] for file in part.files_of(name))
                state[name].copy_(state[name].to(dtype))


@torch.no_grad()
def save(holding: Holding, checkpoint: Checkpoint, output: Path, ranks: Ranks = ALONE) -> None:
    """Write shards, masks, side files and the index, in this order; the index makes it whole.

    Several processes gather a block at a time, and the first writes it.

    Args:
        holding: the trained model.
        checkpoint: what it was read from; the result has its form.
        output: folder of the result.
        ranks: the processes of the run.
    """
    blocks, reader, tensors = holding.blocks, checkpoint.reader, checkpoint.tensors
    products = {each.name: each.low_rank for each in holding.linears if each.low_rank is not None}
    if products:
        config, adapter = adapter_files(products)
        adapter = _gathered(adapter)
        if ranks.first:
            write_safetensors(output / ADAPTER / "adapter_model.safetensors", adapter)
            write_json(output / ADAPTER / "adapter_config.json", config)
    store = StreamedStore(blocks, reader, tensors, output, blocks.model.device)
    for index, block in enumerate(blocks):
        prefix = f"{blocks.name(index)}."
        masks = _gathered(
            {
                each.name.removeprefix(prefix): _mask_OI(holding, each)
                for each in holding.linears
                if each.name.startswith(prefix)
            }
        )
        state = block.state_dict()
        state = _gathered({name: state[name] for name in tensors.blocks[index].names})
        if ranks.first:
            kept = {name: mask.bool() for name, mask in masks.items()}
            # A model that has no mask at all, such as a recovered one, gets no files of them.
            store.save(index, kept if holding.linears else None, state=state)
    changed: dict[str, Tensor] = {}
    for module, part in ((blocks.model.base_model, tensors.outside), (blocks.model, tensors.head)):
        state = module.state_dict()
        whole = _gathered({name: state[name] for name in part.names})
        changed |= part.stored(whole, reader.dtypes)
    if ranks.first:
        store.finish(changed)


def adapter_files(products: Mapping[str, SLoRB]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SLoRB, by full linear name, as ``adapter_config.json`` and tensors in PEFT's format.

    Merging them into the weights would fill every zero, so they are saved beside the checkpoint;
    ``PeftModel.from_pretrained(model, FOLDER)`` and servers that know LoRA put them back.
    """
    ranks = {name: product.s_OR.shape[1] for name, product in products.items()}
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(products),
    }
    tensors = {}
    for name, product in products.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = product.x_RI.data
        tensors[f"{prefix}.lora_B.weight"] = product.s_OR.data
    return config, tensors


def _mask_OI(holding: Holding, each: MaskedLinear) -> Tensor:
    mask = holding.global_tensor(f"{each.name}.weight", each.mask.view(torch.uint8))
    return mask.T if each.linear.transposed else mask


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors; those that are sharded are moved to the processor, one by one."""
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }
