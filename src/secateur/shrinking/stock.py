"""The same sizes in all blocks: widths that stock classes of transformers build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.runs.errors import SecateurError
from secateur.shrinking.source import Source
from secateur.shrinking.units import Kind, SubBlock, Width
from secateur.shrinking.widths import channel_grids, fitting

Sizes = dict[Kind, Width]
"""Widths that all blocks have in common; attention is left out where it stays as it is."""

# Shares of all parameters in the blocks that may go, for the sake of a better multiple, beyond the
# budget, or beyond it or from the wrong sub-block; and by which a budget may be missed.
_MOST_EXCESS = 0.02
_MOST_COST = 0.05
_SHORT = 0.001


def uniform_widths(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    budget: int,
    sparsity: float,
    *,
    whole_groups: bool,
    grid: int | None = None,
) -> list[Width]:
    """Return widths, the same in all blocks, that remove ``budget`` and little more.

    Feed-forwards keep a multiple of ``grid`` channels, or all; attention loses groups, and query
    heads of each unless they stay whole; what is fixed stays as it is. Of widths that remove enough
    those are taken whose *cost* is least: parameters beyond the budget, and those that attention
    loses more or less than ``sparsity`` of it, the budget as a share of all parameters in the
    blocks. Only widths that a stock configuration has count.

    Without ``grid`` it is the first of ``channel_grids`` where no more than 2 % of the blocks'
    parameters go beyond the budget and the cost is no more than 5 % of them, or else the last.

    Raises:
        SecateurError: no such widths exist.
    """
    first = _first_block(sub_blocks)
    share = budget / len(source.blocks)
    total = share / sparsity
    grids = [grid] if grid else channel_grids(first["ffn"].units)
    for step in grids:
        # Norms do not shrink, so widths that are halved hold a little less than one half.
        least = math.ceil(share - (_SHORT * total if step > 1 else 0))
        for excess, cost, sizes in _common_widths(first, least, sparsity, step, whole_groups):
            near = excess <= _MOST_EXCESS * total and cost <= _MOST_COST * total
            if (near or step == grids[-1]) and stock_config(source, sub_blocks, sizes):
                return [sizes[sub_block.kind] for sub_block in sub_blocks]
    narrowest = _narrowest(first, grids[-1], whole_groups)
    most = sum(first[kind].removed(width) for kind, width in narrowest.items()) / total
    if most < sparsity:
        raise SecateurError(
            f"Cut to the same widths in all blocks, this model can lose {percent_below(most)} of "
            f"the parameters of its blocks, and {sparsity:.1%} are asked for; remove less, or "
            "leave out --uniform."
        )
    raise SecateurError(
        f"No stock {source.config['model_type']} is smaller by {sparsity:.0%} of the parameters of "
        "its blocks with the same widths in all; remove less, or leave out --uniform."
    )


def _common_widths(
    first: Mapping[Kind, SubBlock], least: int, sparsity: float, step: int, whole_groups: bool
) -> list[tuple[float, float, Sizes]]:
    """Excess, cost, and the sizes of a block that lacks ``least`` parameters; the best first."""
    feed_forward, attention = first["ffn"], first.get("attention")
    choices: list[Sizes] = [{}]
    if attention is not None:
        widths = attention.widths_from(_narrowest(first, step, whole_groups)["attention"])
        fits = fitting(attention, widths)
        choices = [{"attention": each} for each, fit in zip(widths, fits, strict=True) if fit]
    both = attention is not None and not attention.fixed and not feed_forward.fixed
    found = []
    for sizes in choices:
        lost = sum(first[kind].removed(width) for kind, width in sizes.items())
        due = sparsity * attention.parameters(attention.whole) if both and attention else lost
        channels = feed_forward.units
        if lost < least:
            if feed_forward.fixed:
                continue
            channels -= -(-(least - lost) // feed_forward.unit_parameters)
            channels = channels // step * step
        if channels > 0:
            width = Width(channels, 0)
            excess = lost + feed_forward.removed(width) - least
            found.append((excess, excess + abs(lost - due), {**sizes, "ffn": width}))
    # Of two alike the one of fewer groups comes first, which has the smaller cache.
    return sorted(found, key=lambda each: each[1])


def _narrowest(first: Mapping[Kind, SubBlock], step: int, whole_groups: bool) -> Sizes:
    """The smallest widths that the sub-blocks of all blocks may have in common."""
    sizes: Sizes = {}
    for kind, each in first.items():
        queries = each.heads_per_unit if whole_groups else min(1, each.heads_per_unit)
        least = Width(1, queries) if kind == "attention" else Width(min(step, each.units), 0)
        sizes[kind] = each.whole if each.fixed else least
    return sizes


def percent_below(share: float) -> str:
    """A share that can be reached, rounded down."""
    return f"{math.floor(1000 * share) / 10:.1f}%"


def smallest_stock(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[Width], grid: int | None
) -> tuple[dict[str, Any], Sizes]:
    """The smallest common sizes with a stock configuration that hold all kept units.

    Feed-forwards have a multiple of ``grid`` channels, by default of the first of
    ``channel_grids``, or all.

    Raises:
        SecateurError: the family has no stock class.
    """
    first = _first_block(sub_blocks)
    whole = first["ffn"].whole
    step = grid or channel_grids(whole.units)[0]

    def most(kind: Kind, least: Width) -> Width:
        parts = zip(sub_blocks, kept, strict=True)
        present = [width for each, width in parts if each.kind == kind and width.units] or [least]
        return Width(max(each.units for each in present), max(each.queries for each in present))

    choices: list[Sizes] = [{}]
    if attention := first.get("attention"):
        widths = attention.widths_from(most("attention", Width(1, 1)))
        choices = [{"attention": width} for width in widths]
    wide = min(-(-most("ffn", Width(1, 0)).units // step) * step, whole.units)
    # Not every configuration has a size for feed-forwards; the dense one always fits.
    for channels in dict.fromkeys((Width(wide, 0), whole)):
        for choice in choices:
            sizes: Sizes = {**choice, "ffn": channels}
            config = stock_config(source, sub_blocks, sizes)
            if config is not None:
                return config, sizes
    raise SecateurError(
        f"{source.config['model_type']} is not a family of transformers' own, so there is no stock "
        "class to store a smaller model for; leave out --uniform and --padded."
    )


def _first_block(sub_blocks: Sequence[SubBlock]) -> dict[Kind, SubBlock]:
    """The sub-blocks of the first block, which those of all others must be like."""
    first = {each.kind: each for each in sub_blocks if each.block == 0}
    for each in sub_blocks:
        like = first[each.kind]
        if (each.whole, each.unit_parameters) != (like.whole, like.unit_parameters):
            raise SecateurError(
                "The blocks of this model differ in width from the beginning, so they cannot be "
                "cut to the same widths; leave out --uniform and --padded."
            )
    return first


def stock_config(
    source: Source, sub_blocks: Sequence[SubBlock], sizes: Sizes
) -> dict[str, Any] | None:
    """Return a config.json with which stock classes build blocks of these sizes, if one does.

    A Llama must have a number of heads that divides its hidden size, though it computes with any.
    Mistral without a sliding window is the same network and asks for no such thing, so where Llama
    refuses the model is stored as a Mistral.
    """
    names = source.names
    config = {**source.config, names.width: sizes["ffn"].units}
    config.pop("auto_map", None)
    expected = _shapes(source.blocks[0])
    for sub_block in (each for each in sub_blocks if each.block == 0):
        width = sizes[sub_block.kind]
        if sub_block.kind == "attention" and width != sub_block.whole:
            config[names.groups] = width.units
            config[names.heads] = width.units * width.queries
            config["head_dim"] = sub_block.head_dim
        for axis in sub_block.axes:
            shape = list(expected[axis.parameter])
            shape[axis.axis] = sub_block.extent(axis, width)
            expected[axis.parameter] = tuple(shape)
    for candidate in (config, _as_mistral(config)):
        if candidate is not None and _built_shapes(candidate, source) == expected:
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


def _built_shapes(config: dict[str, Any], source: Source) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the first block that stock classes build, None if they refuse."""
    try:
        parsed = AutoConfig.for_model(**config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except (StrictDataclassError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return _shapes(model.get_submodule(source.blocks.name(0)))


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
