"""Write the smaller checkpoint, a block at a time from the files of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.store import check_finite
from secateur.models.streamed import copy_side_files, shard_name, write_index
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json, write_safetensors, write_text
from secateur.shrinking.cut import cut, pad
from secateur.shrinking.source import Source
from secateur.shrinking.stock import Widths, common_widths, stock_config
from secateur.shrinking.uneven import MODELLING_FILE, modelling_source, uneven_config
from secateur.shrinking.units import SubBlock, Width

Form = Literal["uneven", "uniform", "padded"]

Refitted = Callable[[int], Mapping[str, Tensor]]
"""Gives a block's new parameters by name inside it, of the kept units alone where units lie."""


def as_they_were(_index: int) -> Mapping[str, Tensor]:
    """No parameter of any block has new values."""
    return {}


@dataclass(frozen=True)
class Layout:
    """How a shrunk model is stored.

    Attributes:
        config: its config.json.
        widths: that sub-blocks have in the files; what is beyond the kept ones is zeros.
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
        code = {MODELLING_FILE: modelling_source(source, sub_blocks)}
        # Stock classes know older names of their tensors, a class of our own does not.
        renamed = {file_name: name for name, file_name in source.tensors.head.items()}
        return Layout(uneven_config(source, sub_blocks, kept), list(kept), code, renamed)
    config, widths = _stock_layout(source, sub_blocks, kept)
    stored = [widths.of(sub_block) for sub_block in sub_blocks]
    if form == "uniform" and stored != list(kept):
        raise SecateurError(
            f"No stock {source.config['model_type']} has the widths that were chosen; use --padded."
        )
    return Layout(config, stored)


def _stock_layout(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[Width]
) -> tuple[dict[str, Any], Widths]:
    """The smallest common widths with a stock configuration that hold all kept units."""
    dense = common_widths(sub_blocks)
    present = [part for part in zip(sub_blocks, kept, strict=True) if part[1].units]
    channels = max((width.units for each, width in present if each.kind == "ffn"), default=1)
    heads = [width for each, width in present if each.kind == "attention"]
    choices: Sequence[Width | None] = [None]
    if dense.attention is not None:
        groups = max((width.units for width in heads), default=1)
        queries = max((width.queries for width in heads), default=1)
        attention = next(each for each in sub_blocks if each.kind == "attention")
        choices = attention.widths_from(Width(groups, queries))
    # Not every configuration has a size for feed-forwards; the dense one always fits.
    for count in dict.fromkeys((channels, dense.channels)):
        for choice in choices:
            widths = Widths(choice, count)
            config = stock_config(source, sub_blocks, widths)
            if config is not None:
                return config, widths
    raise SecateurError(
        f"{source.config['model_type']} is not a family of transformers' own, so there is no stock "
        "class to store a smaller model for; leave out --uniform and --padded."
    )


def check_saved(source: Source, layout: Layout, output: Path) -> None:
    """Hold names and shapes in the files against what their own classes build.

    Raises:
        SecateurError: loading would leave weights out.
    """
    # The code of a layout is our own.
    trusted = bool(layout.code) or source.trust_remote_code
    tensors = Checkpoint.at(output, trust_remote_code=trusted).mapped
    if isinstance(tensors, str) or tensors.head.keys() != source.tensors.head.keys():
        reason = tensors if isinstance(tensors, str) else "the output head has another name"
        raise SecateurError(
            f"The checkpoint in {output} would not load whole, {reason}; please report the model "
            "and the options."
        )


def export(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    layout: Layout,
    output: Path,
    refitted: Refitted = as_they_were,
) -> None:
    """Write a checkpoint with the kept units alone; the folder loads once all of it is there.

    Args:
        source: the dense checkpoint.
        sub_blocks: its sub-blocks.
        kept: what stays of each sub-block, as ``units`` has it.
        layout: from ``plan_layout``, for these widths.
        output: the folder to write to.
        refitted: parameters that are to have other values than in the dense files.

    Raises:
        SecateurError: weights are NaN or infinite, or the disk is full.
    """
    count, size = len(source.blocks), 0
    files: dict[str, str] = {}
    for index, names in enumerate(source.tensors.blocks):
        block = _small_block(source, index, sub_blocks, kept, layout, refitted)
        shard = shard_name(index, count)
        write_safetensors(output / shard, {names[name]: block[name] for name in names})
        files |= dict.fromkeys(names.values(), shard)
        size += sum(tensor.nbytes for tensor in block.values())
    outside = source.reader.read(source.tensors.rest)
    rest = {layout.renamed.get(name, name): tensor for name, tensor in outside.items()}
    write_safetensors(output / shard_name(count, count), rest)
    files |= dict.fromkeys(rest, shard_name(count, count))
    size += sum(tensor.nbytes for tensor in rest.values())
    copy_side_files(source.folder, output)
    for name, text in layout.code.items():
        write_text(output / name, text)
    write_json(output / "config.json", layout.config)
    write_safetensors(
        output / "secateur" / "kept.safetensors",
        {each.label: units for each, units in zip(sub_blocks, kept, strict=True)},
    )
    # The index comes last: a folder that has one is complete.
    write_index(output, files, size)


def _small_block(
    source: Source,
    index: int,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    layout: Layout,
    refitted: Refitted,
) -> dict[str, Tensor]:
    """Tensors of one block as the layout has them, by name inside it, in the files' dtypes."""
    names = source.tensors.blocks[index]
    read = source.reader.read(names.values())
    block = {name: read[file_name] for name, file_name in names.items()}
    check_finite(block, source.blocks.name(index))
    parts = [
        part for part in zip(sub_blocks, kept, layout.widths, strict=True) if part[0].block == index
    ]
    for sub_block, units, _ in parts:
        block |= cut(sub_block, block, units)
    block |= {name: tensor.to(block[name].dtype) for name, tensor in refitted(index).items()}
    for sub_block, units, width in parts:
        block |= pad(sub_block, block, sub_block.width_of(units), width)
    return block
