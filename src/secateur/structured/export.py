"""Write the smaller checkpoint, a block at a time from the files of the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from secateur.checkpoint.files import write_json, write_safetensors, write_text
from secateur.checkpoint.store import check_finite
from secateur.checkpoint.streamed import copy_side_files, shard_name, write_index
from secateur.errors import SecateurError
from secateur.structured.cut import cut, pad
from secateur.structured.source import Source
from secateur.structured.stock import Widths, common_widths, stock_config
from secateur.structured.uneven import MODELLING_FILE, modelling_source, uneven_config
from secateur.structured.units import SubBlock

Form = Literal["uneven", "uniform", "padded"]


@dataclass(frozen=True)
class Layout:
    """How a shrunk model is stored.

    Attributes:
        config: its config.json.
        units: units that each sub-block has in the files; those beyond the kept ones are zeros.
        code: files of Python that it needs, by name.
    """

    config: dict[str, Any]
    units: list[int]
    code: dict[str, str] = field(default_factory=dict)


def plan_layout(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[int], form: Form
) -> Layout:
    """Decide how to store a model with ``kept`` units in its sub-blocks.

    Raises:
        SecateurError: the form cannot hold such a model.
    """
    if form == "uneven":
        code = {MODELLING_FILE: modelling_source(source, sub_blocks)}
        return Layout(uneven_config(source, sub_blocks, kept), list(kept), code)
    config, widths = _stock_layout(source, sub_blocks, kept)
    units = [widths.of(sub_block) for sub_block in sub_blocks]
    if form == "uniform" and units != list(kept):
        raise SecateurError(
            f"No stock {source.config['model_type']} has the widths that were chosen; use --padded."
        )
    return Layout(config, units)


def _stock_layout(
    source: Source, sub_blocks: Sequence[SubBlock], kept: Sequence[int]
) -> tuple[dict[str, Any], Widths]:
    """The smallest common widths with a stock configuration that hold all kept units."""
    dense = common_widths(sub_blocks)
    widest = {"attention": 1, "ffn": 1}
    for sub_block, count in zip(sub_blocks, kept, strict=True):
        widest[sub_block.kind] = max(widest[sub_block.kind], count)
    choices: list[int | None] = [None]
    if dense.groups is not None:
        choices = list(range(widest["attention"], dense.groups + 1))
    # Not every configuration has a size for feed-forwards; the dense one always fits.
    for channels in dict.fromkeys((widest["ffn"], dense.channels)):
        for groups in choices:
            widths = Widths(groups, channels)
            config = stock_config(source, sub_blocks, widths)
            if config is not None:
                return config, widths
    raise SecateurError(
        f"{source.config['model_type']} is not a family of transformers' own, so there is no stock "
        "class to store a smaller model for; leave out --uniform and --padded."
    )


def export(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    layout: Layout,
    output: Path,
    refitted: Path | None = None,
) -> None:
    """Write a checkpoint with the kept units alone; the folder loads once all of it is there.

    Args:
        source: the dense checkpoint.
        sub_blocks: its sub-blocks.
        kept: int64 indices of the units that stay, for each sub-block.
        layout: from ``plan_layout``, for as many units.
        output: the folder to write to.
        refitted: the folder of ``write_refitted``, whose outputs replace those of the files.

    Raises:
        SecateurError: weights are NaN or infinite, or the disk is full.
    """
    count, size = len(source.blocks), 0
    files: dict[str, str] = {}
    for index, names in enumerate(source.tensors.blocks):
        read = source.reader.read(names.values())
        block = {name: read[file_name] for name, file_name in names.items()}
        check_finite(block, source.blocks.name(index))
        new = read_refitted(refitted, index) if refitted else {}
        for sub_block, units, width in zip(sub_blocks, kept, layout.units, strict=True):
            if sub_block.block == index:
                small = cut(sub_block, block, units, new.get(sub_block.kind))
                block |= pad(sub_block, small, len(units), width) if width > len(units) else small
        size += sum(tensor.nbytes for tensor in block.values())
        write_safetensors(
            output / shard_name(index, count),
            {names[name]: tensor for name, tensor in block.items()},
        )
        files |= dict.fromkeys(names.values(), shard_name(index, count))
    rest = source.tensors.rest
    write_safetensors(output / shard_name(count, count), source.reader.read(rest))
    files |= dict.fromkeys(rest, shard_name(count, count))
    copy_side_files(source.folder, output)
    for name, text in layout.code.items():
        write_text(output / name, text)
    write_json(output / "config.json", layout.config)
    write_safetensors(
        output / "secateur" / "kept.safetensors",
        {each.label: units for each, units in zip(sub_blocks, kept, strict=True)},
    )
    # The index comes last: a folder that has one is complete.
    write_index(output, files, size + source.reader.bytes_of(rest))


def write_refitted(folder: Path, index: int, outputs_OK: Mapping[str, Tensor]) -> None:
    """Keep the refitted output matrices of a block, by kind of sub-block."""
    write_safetensors(_refitted_file(folder, index), outputs_OK)


def read_refitted(folder: Path, index: int) -> dict[str, Tensor]:
    """Return what ``write_refitted`` kept."""
    return load_file(_refitted_file(folder, index))


def _refitted_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:03d}.safetensors"
