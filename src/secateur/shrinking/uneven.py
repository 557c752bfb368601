"""Checkpoints whose blocks differ in width: a configuration per block, and a small class for it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from string import Template
from typing import Any

import transformers

from secateur.runs.errors import SecateurError
from secateur.shrinking import resizing
from secateur.shrinking.source import Source
from secateur.shrinking.units import SubBlock, Width

MODELLING_FILE = "modeling_shrunk.py"

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


class $shrunk_config($config):
    """$config of its own class, so that other models of the family are left alone."""


class $shrunk($base):
    """$base whose blocks have the sizes in ``config.per_layer_config``."""

    config_class = $shrunk_config

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
                block.get_submodule("$attention"),
                block.get_submodule("$output"),
                heads=sizes.$heads,
                groups=sizes.$groups,
            )
""")


def _class_names(source: Source) -> dict[str, str]:
    """Names of the classes that the modelling file builds upon, and of those that it makes."""
    name = type(source.blocks.model).__name__
    if getattr(transformers, name, None) is not type(source.blocks.model):
        raise SecateurError(
            f"{name} is not part of transformers, so blocks of different widths cannot be built "
            "upon it; use --uniform or --padded."
        )
    config = type(source.blocks.model.config).__name__
    return {
        "base": name,
        "shrunk": f"Shrunk{name}",
        "config": config,
        "shrunk_config": f"Shrunk{config}",
    }


def uneven_config(
    source: Source, sub_blocks: Sequence[SubBlock], widths: Sequence[Width]
) -> dict[str, Any]:
    """Return config.json for blocks whose sub-blocks have these widths."""
    sizes: dict[str, dict[str, int]] = {}
    names = source.names
    for sub_block, width in zip(sub_blocks, widths, strict=True):
        own = sizes.setdefault(str(sub_block.block), {})
        if sub_block.kind == "ffn":
            own[names.width] = width.units
        else:
            own[names.groups] = width.units
            own[names.heads] = width.units * width.queries
    module = MODELLING_FILE.removesuffix(".py")
    classes = _class_names(source)
    return {
        **source.config,
        "architectures": [classes["shrunk"]],
        "auto_map": {
            "AutoConfig": f"{module}.{classes['shrunk_config']}",
            "AutoModelForCausalLM": f"{module}.{classes['shrunk']}",
        },
        # Stock code around the blocks reads the dense model's sizes, which it handles well.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": sizes,
    }


def modelling_source(source: Source, sub_blocks: Sequence[SubBlock]) -> str:
    """Return the Python file that builds blocks of different widths."""
    classes = _class_names(source)
    _require_one_geometry(sub_blocks)
    first = {each.kind: each for each in sub_blocks if each.block == 0}
    attention = first.get("attention")
    values = {**classes, "blocks": source.blocks.prefix, "width": source.names.width}
    body = inspect.getsource(resizing).split('"""', 2)[2]
    stock_import = "from transformers.pytorch_utils import"
    base_import = f"from transformers import {classes['config']}, {classes['base']}"
    body = body.replace(stock_import, f"{base_import}\n{stock_import}", 1)
    return (
        _DOCSTRING.substitute(values)
        + body
        + "\n"
        + _CLASS.substitute(
            values,
            attention="" if attention is None else _table(attention),
            feed_forward=_table(first["ffn"]),
            resize_attention=""
            if attention is None
            else _RESIZE_ATTENTION.substitute(
                attention=attention.attention,
                output=attention.output,
                heads=source.names.heads,
                groups=source.names.groups,
            ),
        )
    )


def _require_one_geometry(sub_blocks: Sequence[SubBlock]) -> None:
    """The modelling file says once for all blocks what a unit is."""
    for kind in ("attention", "ffn"):
        units = {
            tuple((axis.parameter, axis.positions_UP.shape[1]) for axis in each.axes)
            for each in sub_blocks
            if each.kind == kind
        }
        if len(units) > 1:
            raise SecateurError(
                f"The {kind} of this model has units of different shapes in different blocks, for "
                "which there is no way to store the result; choose another model."
            )


def _table(sub_block: SubBlock) -> str:
    rows = []
    for axis in sub_block.axes:
        if axis.parameter.endswith(".weight"):
            side = "columns" if axis.linear == sub_block.output else "rows"
            sizes = [axis.positions_UP.shape[1]]
            if sub_block.kind == "attention":
                heads = sub_block.heads_per_unit * axis.head_positions
                sizes = [axis.head_positions, sizes[0] - heads]
            rows.append(f'    ("{axis.linear}", "{side}", {", ".join(map(str, sizes))}),\n')
    return "".join(rows)
