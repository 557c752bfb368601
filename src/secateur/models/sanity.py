"""What a configuration says, held against the headers of the weights before a model is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.runs.errors import SecateurError, explained
from secateur.runs.reading import read_json_object

_ACTION = "fetch the checkpoint again."
# Numbers of things that each have parameters of their own; max_… are limits and no counts.
_LAYERS = re.compile(r"^(?!max_)(\w+_)?(layers?|depth)$")
# Numbers of things that a dimension of some tensor counts.
_PARTS = re.compile(r"^(n|num|moe_num|mamba_n|linear_num)_(\w+_)?(experts|heads|groups)$")
# Buffers are tables of positions and frequencies; those of real models are some megabytes.
_LARGEST_BUFFERS = 1 << 32


def check_configuration(folder: Path, shapes: Collection[tuple[int, ...]]) -> None:
    """Refuse a ``config.json`` that is none, or that speaks of another model than the weights.

    A loader would build what it says, however large, before it looks at the weights.

    Args:
        folder: the checkpoint.
        shapes: of the tensors in its files.

    Raises:
        SecateurError: it is no JSON object, a part of it is of another kind than it has to be, or
            it counts more layers, experts or heads than the headers of the weights have room for.
    """
    path = folder / "config.json"
    values = read_json_object(path, "The configuration", _ACTION)
    for key, kind, form in (
        ("model_type", str, "a name"),
        ("architectures", list, "a list of names"),
        ("quantization_config", dict, "an object"),
        ("auto_map", dict, "an object"),
    ):
        if not isinstance(values.get(key), kind | None):
            raise SecateurError(f"The {key} in {path} is not {form}; {_ACTION}")
    if values.get("quantization_config") == {}:
        raise SecateurError(
            f"The quantization_config in {path} is empty; remove the line if the weights are "
            "plain, or fetch the checkpoint again."
        )
    for key in ("attn_implementation", "_attn_implementation"):
        # Such a name is that of code on the hub.
        if "/" in str(values.get(key)):
            raise SecateurError(
                f"The {key} in {path} names code outside the checkpoint; remove the line."
            )
    if not shapes:
        return
    largest = max((size for shape in shapes for size in shape), default=0)
    for key, count in _counts(values):
        # A layer that is named, such as the last but one, is no count.
        if count < 0 and key.startswith(("n_", "num_")):
            raise SecateurError(f"The {key} in {path} is {count}; {_ACTION}")
        limit = len(shapes) if _LAYERS.search(key) else max(len(shapes), largest)
        if count > limit:
            raise SecateurError(
                f"The {key} in {path} is {count}, and the files of the weights have {len(shapes)} "
                f"tensors with dimensions up to {largest}; the configuration and the weights do "
                "not belong together."
            )


def check_generation(folder: Path) -> None:
    """Raise SecateurError if a ``generation_config.json`` beside the weights is damaged."""
    path = folder / "generation_config.json"
    if path.is_file():
        read_json_object(path, "The file", "mend or remove it.")


def build_checked(build: Callable[[], PreTrainedModel], folder: str) -> PreTrainedModel:
    """Build a model once it is known that its buffers have a sensible size.

    Args:
        build: makes the model; called twice, at first on the meta device.
        folder: whose configuration it follows.

    Raises:
        SecateurError: it cannot be built.
    """
    with explained(
        f"The model that the configuration in {folder} describes cannot be built",
        "check config.json, or fetch it again.",
    ):
        with torch.device("meta"):
            size = sum(buffer.nbytes for buffer in build().buffers())
        if size > _LARGEST_BUFFERS:
            raise SecateurError(
                f"The configuration in {folder} asks for tables of {size / 1e9:.1f} GB beside the "
                "weights; check its numbers of positions and its sizes."
            )
        return build()


def _counts(values: Any) -> Iterator[tuple[str, int]]:
    """Numbers of layers and of parts of them, however deep they lie."""
    inner = values.items() if isinstance(values, dict) else ()
    for key, value in inner:
        if type(value) is int and (_LAYERS.search(key) or _PARTS.search(key)):
            yield key, value
        elif isinstance(value, dict):
            yield from _counts(value)
