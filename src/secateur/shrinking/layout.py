"""How a smaller model is stored: sizes that stock classes build, or a modelling file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.runs.errors import SecateurError
from secateur.shrinking import module_sizes
from secateur.shrinking.options import Form
from secateur.shrinking.source import Source
from secateur.shrinking.units import Kind, SubBlock, Width

Sizes = dict[Kind, Width]
"""Widths that all blocks have in common; attention is left out where it stays as it is."""

_MODELLING_FILE = "modeling_shrunk.py"


@dataclass(frozen=True)
class Layout:
    """How a shrunk model is stored.

    Attributes:
        config: its config.json.
        widths: of the sub-blocks in the files; what is beyond the kept units is zeros.
        code: files of Python that it needs, by name.
        renamed: tensors outside the blocks that need another name than in the source.
    """

    config: dict[str, Any]
    widths: list[Width]
    code: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def plan_layout(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[Width], form: Form
) -> Layout:
    """Decide how to store a model whose sub-blocks are cut to ``kept``.

    Raises:
        SecateurError: the form cannot hold such a model.
    """
    if form == "uneven":
        code = {_MODELLING_FILE: _modelling_source(source, sub_blocks)}
        # Stock classes know older names of their tensors, a class of our own does not.
        head = source.tensors.head
        renamed = {file: name for name in head.names for file in head.files_of(name)}
        return Layout(_uneven_config(source, sub_blocks, kept), list(kept), code, renamed)
    config, sizes = _smallest_stock(source, sub_blocks, kept)
    stored = [sizes[sub_block.kind] for sub_block in sub_blocks]
    if form == "uniform" and stored != list(kept):
        raise SecateurError(
            f"No stock {source.config['model_type']} has the widths that were chosen; use --padded."
        )
    return Layout(config, stored)


# The same sizes in all blocks.


def uniform_widths(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    budget: int,
    sparsity: float,
    *,
    whole_groups: bool,
    grid: int | None = None,
) -> list[Width]:
    """Return widths, the same in all blocks, that remove as much of ``budget`` as they can.

    Attention loses groups, and query heads of each unless they stay whole, so that what it loses
    comes nearest to ``sparsity``, the budget as a share of all parameters in the blocks.
    Feed-forwards make up the rest to less than one step per block; they keep a multiple of ``grid``
    channels, or all. Only widths that a stock configuration has count.

    Raises:
        SecateurError: no such widths exist.
    """
    first = _first_block(sub_blocks)
    feed_forward, attention = first["ffn"], first.get("attention")
    share, step = budget // len(source.blocks), grid or 1
    choices: list[Sizes] = [{}]
    if attention is not None:
        whole = attention.parameters(attention.whole)

        def distance(width: Width) -> tuple[float, int]:
            gone = attention.removed(width)
            # Of two alike the one with the smaller cache comes first.
            return round(abs(gone / whole - sparsity), 9), gone

        least = Width(1, attention.heads_per_unit if whole_groups else 1)
        widths = sorted(attention.widths_from(least), key=distance)
        choices = [{"attention": width} for width in widths]
    for sizes in choices:
        gone = sum(first[kind].removed(width) for kind, width in sizes.items())
        channels = feed_forward.units - (share - gone) // feed_forward.unit_parameters
        if 0 < channels <= feed_forward.units:
            rounded = min(-(-channels // step) * step, feed_forward.units)
            sizes = {**sizes, "ffn": Width(rounded, 0)}
            if stock_config(source, sub_blocks, sizes):
                return [sizes[sub_block.kind] for sub_block in sub_blocks]
    raise SecateurError(
        f"No stock {source.config['model_type']} is smaller by {sparsity:.0%} of the parameters of "
        "its blocks with the same widths in all; remove less, or leave out --uniform."
    )


def _smallest_stock(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[Width]
) -> tuple[dict[str, Any], Sizes]:
    """The smallest common sizes with a stock configuration that hold all kept units."""
    first = _first_block(sub_blocks)

    def most(kind: Kind, least: Width) -> Width:
        parts = zip(sub_blocks, kept, strict=True)
        present = [width for each, width in parts if each.kind == kind and width.units] or [least]
        return Width(max(each.units for each in present), max(each.queries for each in present))

    choices: list[Sizes] = [{}]
    if attention := first.get("attention"):
        widths = attention.widths_from(most("attention", Width(1, 1)))
        choices = [{"attention": width} for width in widths]
    # Not every configuration has a size for feed-forwards; the dense one always fits.
    for channels in dict.fromkeys((most("ffn", Width(1, 0)), first["ffn"].whole)):
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


# Widths that differ: a configuration for each block, and a class that builds them.

_DOCSTRING = Template('''"""$base with blocks of different widths.

Blocks are built as usual, then their linears get the sizes that the configuration has for each
block under per_layer_config; weights, cache and generation are those of the class. Load with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""''')

_CLASS = Template('''

# Linears inside a block: which side of them shrinks, and how much of it one query head and one
# key-value group have of their own.
ATTENTION = [
$attention]
# The same, and how much of it one channel has.
FEED_FORWARD = [
$feed_forward]


class Shrunk$config($config):
    """$config of its own class, so that other models of the family are left alone."""


class Shrunk$base($base):
    """$base whose blocks have the sizes in ``config.per_layer_config``."""

    config_class = Shrunk$config

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not config.is_heterogeneous:
            return
        blocks = self.get_submodule("$blocks")
        for block, sizes in zip(blocks, config.per_layer_config, strict=True):
            for name, side, size in FEED_FORWARD:
                resize(block.get_submodule(name), **{side: size * sizes.$width})
$resize_attention''')

_RESIZE_ATTENTION = Template("""            for name, side, head, group in ATTENTION:
                size = head * sizes.$heads + group * sizes.$groups
                resize(block.get_submodule(name), **{side: size})
            fit_attention(
                block.get_submodule("$module"),
                block.get_submodule("$output"),
                heads=sizes.$heads,
                groups=sizes.$groups,
            )
""")


def _class_names(source: Source) -> tuple[str, str]:
    """Classes of model and configuration that the modelling file builds upon."""
    name = type(source.blocks.model).__name__
    if getattr(transformers, name, None) is not type(source.blocks.model):
        raise SecateurError(
            f"{name} is not part of transformers, so blocks of different widths cannot be built "
            "upon it; use --uniform or --padded."
        )
    return name, type(source.blocks.model.config).__name__


def _uneven_config(
    source: Source, sub_blocks: Sequence[SubBlock], widths: Sequence[Width]
) -> dict[str, Any]:
    sizes: dict[str, dict[str, int]] = {}
    names = source.names
    for sub_block, width in zip(sub_blocks, widths, strict=True):
        own = sizes.setdefault(str(sub_block.block), {})
        if sub_block.kind == "ffn":
            own[names.width] = width.units
        else:
            own[names.groups] = width.units
            own[names.heads] = width.units * width.queries
    module = _MODELLING_FILE.removesuffix(".py")
    base, config = _class_names(source)
    return {
        **source.config,
        "architectures": [f"Shrunk{base}"],
        "auto_map": {
            "AutoConfig": f"{module}.Shrunk{config}",
            "AutoModelForCausalLM": f"{module}.Shrunk{base}",
        },
        # Stock code around the blocks reads the dense model's sizes, which it handles well.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": sizes,
    }


def _modelling_source(source: Source, sub_blocks: Sequence[SubBlock]) -> str:
    """The Python file that builds blocks of different widths; it says once what a unit is."""
    for kind in ("attention", "ffn"):
        alike = [each for each in sub_blocks if each.kind == kind]
        if len({_table(each) for each in alike}) > 1:
            raise SecateurError(
                f"The {kind} of this model has units of different shapes in different blocks, for "
                "which there is no way to store the result; choose another model."
            )
    base, config = _class_names(source)
    first = {each.kind: each for each in sub_blocks if each.block == 0}
    values = {
        **source.names._asdict(),
        "base": base,
        "config": config,
        "blocks": source.blocks.prefix,
        "feed_forward": _table(first["ffn"]),
        "attention": "",
        "resize_attention": "",
    }
    if attention := first.get("attention"):
        values["attention"] = _table(attention)
        values["resize_attention"] = _RESIZE_ATTENTION.substitute(
            values, module=attention.attention, output=attention.output
        )
    body = inspect.getsource(module_sizes).split('"""', 2)[2]
    stock = "from transformers.pytorch_utils import"
    ours = f"from transformers import {config}, {base}\n{stock}"
    return _DOCSTRING.substitute(values) + body.replace(stock, ours, 1) + _CLASS.substitute(values)


def _table(sub_block: SubBlock) -> str:
    rows = []
    for axis in sub_block.axes:
        linear, _, leaf = axis.parameter.rpartition(".")
        if leaf == "weight":
            side = "columns" if linear == sub_block.output else "rows"
            sizes = [axis.positions_UP.shape[1]]
            if sub_block.kind == "attention":
                heads = sub_block.heads_per_unit * axis.head_positions
                sizes = [axis.head_positions, sizes[0] - heads]
            rows.append(f'    ("{linear}", "{side}", {", ".join(map(str, sizes))}),\n')
    return "".join(rows)
