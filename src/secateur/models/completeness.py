"""Whether the files hold all that a model needs; what is missing is named, with a reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.models.reader import CheckpointReader
from secateur.models.tensors import Matched
from secateur.runs.errors import SecateurError

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ADAPTER = re.compile(r"(^base_model\.model\.)|\.lora_[AB]\.|\.lora_magnitude")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_shape|"
    r"weight_zero_point|input_scale|SCB|absmax|quant_map|quant_state\..*|weight\.(absmax|SCB|"
    r"quant_map|nested_absmax|quant_state\..*))$"
)
_DESCRIPTIONS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def check_complete(model: PreTrainedModel, reader: CheckpointReader, matched: Matched) -> None:
    """Raise SecateurError unless every parameter comes from the files as the model needs it.

    Args:
        model: built from the configuration; its parameters may be on the meta device.
        reader: of the checkpoint.
        matched: what of the files belongs to what of the model.
    """
    folder = reader.folder
    coded = [
        file
        for name, origin in matched.origins.items()
        if model.get_parameter_or_buffer(name).is_floating_point()
        for file in origin.group.files
        if reader.dtypes[file] not in _NUMBERS
    ]
    if coded:
        dtype = str(reader.dtypes[coded[0]]).removeprefix("torch.")
        raise SecateurError(
            f"{coded[0]} in {folder} is stored as {dtype}, and config.json does not say how its "
            "numbers are meant; the weights are quantised without a label, so name the plain "
            "checkpoint they were made from."
        )
    if matched.missing:
        raise SecateurError(
            f"The files of {folder} lack {_listed(matched.missing)}: "
            f"{_reason(model, reader, matched)}."
        )
    for file, (found, wanted) in matched.misfits.items():
        raise SecateurError(
            f"{file} in {folder} has shape {found} where config.json asks for {wanted}; the "
            "configuration and the weights do not belong together."
        )
    if matched.clashes:
        raise SecateurError(
            f"The weights in {folder} contradict each other or config.json, {matched.clashes[0]}; "
            "fetch the checkpoint again."
        )
    _check_no_more_blocks(model, folder, matched)


def _listed(names: Sequence[str]) -> str:
    shown = " and ".join(names[:2]) if len(names) <= 2 else ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more tensors"


def _reason(model: PreTrainedModel, reader: CheckpointReader, matched: Matched) -> str:
    """The likely reason why tensors are missing, and what to do."""
    folder, missing = reader.folder, matched.missing
    if any(_ADAPTER.search(file) for file in matched.unknown):
        return "they hold an adapter; merge it into its model and name the result"
    described = next((name for name in _DESCRIPTIONS if (folder / name).is_file()), None)
    quantised = next((file for file in matched.unknown if _QUANTISED.search(file)), described)
    if quantised is not None:
        return (
            f"{quantised} speaks of quantised weights, which config.json does not label; name the "
            "plain checkpoint they were made from"
        )
    if not matched.origins:
        return (
            f"none of their tensors, such as {next(iter(reader.files), 'none')}, is one of a "
            f"{model.config.model_type}; config.json and the weights do not belong together"
        )
    if (counts := _blocks(model, missing, matched.origins)) is not None:
        asked, held = counts
        return (
            f"config.json asks for {asked} blocks and the files hold {held}; put the number of "
            "blocks right, or fetch the files that are missing"
        )
    base = f"{model.base_model_prefix}."
    if model.base_model is not model and not any(name.startswith(base) for name in missing):
        return (
            "they hold the base model without its head; name a checkpoint of the causal language "
            "model"
        )
    return "the files are incomplete; fetch the checkpoint again"


def _blocks(
    model: PreTrainedModel, missing: Iterable[str], present: Iterable[str]
) -> tuple[int, int] | None:
    """Numbers of blocks in the model and in the files, if only whole last blocks are missing."""
    lists = _lists(model)
    held = dict.fromkeys(lists, 0)
    for name in present:
        for prefix in lists:
            if (number := _number(name, prefix)) is not None:
                held[prefix] = max(held[prefix], number + 1)
    for prefix, count in lists.items():
        numbers = [_number(name, prefix) for name in missing]
        if 0 < held[prefix] < count and all(
            number is not None and number >= held[prefix] for number in numbers
        ):
            return count, held[prefix]
    return None


def _check_no_more_blocks(model: PreTrainedModel, folder: Path, matched: Matched) -> None:
    """Refuse files with more blocks than the model; those would be left out in silence."""
    text = model.config.get_text_config()
    # Blocks behind the last one that predict further tokens; they are carried.
    further = int(getattr(text, "num_nextn_predict_layers", None) or 0)
    known = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    lists = _lists(model)
    base = f"{model.base_model_prefix}."
    for file, name in matched.unknown.items():
        if any(pattern.search(name) for pattern in known):
            continue
        for prefix, count in lists.items():
            number = _number(name, prefix)
            if number is None:
                number = _number(base + name, prefix)
            if number is not None and number >= count + further:
                raise SecateurError(
                    f"{folder} holds {file}, and config.json asks for {count} of {prefix[:-1]} "
                    "alone; the configuration and the weights do not belong together."
                )


def _lists(model: PreTrainedModel) -> dict[str, int]:
    """Lengths of the module lists by prefix, outer ones first."""
    return {
        f"{name}.": len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }


def _number(name: str, prefix: str) -> int | None:
    """The number of the module in a list that a name belongs to."""
    if not name.startswith(prefix):
        return None
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if number.isdecimal() else None
