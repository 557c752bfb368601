"""Find the stock configuration of a model whose blocks were all cut to the same widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.models.structure import find_blocks
from secateur.runs.errors import SecateurError
from secateur.shrinking.source import Source
from secateur.shrinking.units import SubBlock, Width


@dataclass(frozen=True)
class Widths:
    """Sizes that all blocks have in common.

    Attributes:
        attention: key-value groups and query heads in each; None leaves attention as it is.
        channels: channels of the feed-forward.
    """

    attention: Width | None
    channels: int

    def of(self, sub_block: SubBlock) -> Width:
        """The one that a sub-block has."""
        if sub_block.kind == "ffn":
            return Width(self.channels, 0)
        assert self.attention is not None
        return self.attention


def common_widths(sub_blocks: Sequence[SubBlock]) -> Widths:
    """Return the widths of a dense model.

    Raises:
        SecateurError: its blocks differ.
    """
    sizes = {
        kind: {(each.whole, each.unit_parameters) for each in sub_blocks if each.kind == kind}
        for kind in ("attention", "ffn")
    }
    if any(len(found) > 1 for found in sizes.values()):
        raise SecateurError(
            "The blocks of this model differ in width from the beginning, so they cannot be cut to "
            "the same widths; leave out --uniform and --padded."
        )
    attention = next((width for width, _ in sizes["attention"]), None)
    ((feed_forward, _),) = sizes["ffn"]
    return Widths(attention, feed_forward.units)


def stock_config(
    source: Source, sub_blocks: Sequence[SubBlock], widths: Widths
) -> dict[str, Any] | None:
    """Return a config.json with which stock classes build blocks of these widths, if one does.

    A Llama must have a number of heads that divides its hidden size, though it computes with any.
    Mistral without a sliding window is the same network and asks for no such thing, so where Llama
    refuses the model is stored as a Mistral.
    """
    names = source.names
    config = {**source.config, names.width: widths.channels}
    config.pop("auto_map", None)
    attention = next((each for each in sub_blocks if each.kind == "attention"), None)
    if attention is not None and widths.attention not in (None, attention.whole):
        groups, queries = widths.of(attention)
        config[names.groups] = groups
        config[names.heads] = groups * queries
        config["head_dim"] = attention.head_dim
    expected = _shapes(source.blocks.model)
    for sub_block in (each for each in sub_blocks if each.block == 0):
        for axis in sub_block.axes:
            shape = list(expected[axis.parameter])
            shape[axis.axis] = sub_block.extent(axis, widths.of(sub_block))
            expected[axis.parameter] = tuple(shape)
    for candidate in (config, _as_mistral(config)):
        if candidate is not None and _built_shapes(candidate) == expected:
            return candidate
    return None


def _as_mistral(config: dict[str, Any]) -> dict[str, Any] | None:
    if config.get("model_type") != "llama":
        return None
    dropped = ("pretraining_tp", "attention_bias", "mlp_bias")
    kept = {name: value for name, value in config.items() if name not in dropped}
    return kept | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }


def _built_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the first block that stock classes build, None if they refuse."""
    try:
        parsed = AutoConfig.for_model(**config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except (StrictDataclassError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return _shapes(model)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    block = find_blocks(model)[0]
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
