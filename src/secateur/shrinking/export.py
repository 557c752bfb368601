"""Write the smaller checkpoint, a block at a time from the files of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.files import copy_side_files, write_index
from secateur.models.inspection import format_fits, stored_linears
from secateur.models.reader import CheckpointReader
from secateur.models.store import check_finite
from secateur.models.streamed import shard_name
from secateur.report.documents.shrink import FormatReport, ParameterReport
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json, write_safetensors, write_text
from secateur.shrinking.layout import Layout
from secateur.shrinking.source import Source
from secateur.shrinking.units import SubBlock, block_parameters

Refitted = Callable[[int], Mapping[str, Tensor]]
"""Gives a block's new parameters by name inside it, of the kept units alone where units lie."""


def as_they_were(_index: int) -> Mapping[str, Tensor]:
    """No parameter of any block has new values."""
    return {}


def export(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    layout: Layout,
    output: Path,
    refitted: Refitted = as_they_were,
) -> None:
    """Write a checkpoint with the kept units alone; the folder loads once all of it is there.

    ``layout`` is that of these widths. ``refitted`` gives parameters that have other values than in
    the dense files.

    Raises:
        SecateurError: weights are NaN or infinite, or the disk is full.
    """
    count, size = len(source.blocks), 0
    files: dict[str, str] = {}
    for index, part in enumerate(source.tensors.blocks):
        block = _small_block(source, index, sub_blocks, kept, layout, refitted)
        shard = shard_name(index, count)
        tensors = part.stored(block, source.reader.dtypes)
        write_safetensors(output / shard, tensors)
        files |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    # Mapped, for embeddings may be larger than any block.
    outside = {name: source.reader.mapped(name) for name in source.tensors.rest}
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
    block = source.tensors.blocks[index].read(source.reader)
    check_finite(block, f"{source.blocks.name(index)}.")
    parts = [
        part for part in zip(sub_blocks, kept, layout.widths, strict=True) if part[0].block == index
    ]
    for sub_block, units, _ in parts:
        block |= sub_block.cut(block, units)
    block |= {name: tensor.to(block[name].dtype) for name, tensor in refitted(index).items()}
    for sub_block, units, width in parts:
        block |= sub_block.pad(block, sub_block.width_of(units), width)
    return block


def check_saved(source: Source, layout: Layout, output: Path) -> Checkpoint:
    """Hold names and shapes in the files against what their own classes build.

    Returns:
        The saved checkpoint.

    Raises:
        SecateurError: loading would leave weights out.
    """
    # The code of a layout is our own.
    trusted = bool(layout.code) or source.trust_remote_code
    try:
        return Checkpoint.at(output, trust_remote_code=trusted)
    except SecateurError as error:
        raise SecateurError(
            f"The checkpoint in {output} would not load whole, please report the model and the "
            f"options: {error}"
        ) from error


def count_parameters(
    source: Source,
    saved: CheckpointReader,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    target: float,
    *,
    padded: bool,
) -> ParameterReport:
    """Count what the files hold and what the kept units hold.

    Raises:
        SecateurError: the two do not agree, though nothing was padded.
    """
    before, after = (
        sum(torch.Size(shape).numel() for shape in reader.shapes.values())
        for reader in (source.reader, saved)
    )
    total = block_parameters(source.blocks)
    removed = sum(
        each.removed(each.width_of(units)) for each, units in zip(sub_blocks, kept, strict=True)
    )
    if not padded and before - after != removed:
        raise SecateurError(
            f"The saved files hold {before - after} parameters less where {removed} were removed; "
            "please report the model and the options."
        )
    return ParameterReport(
        model_before=before,
        model_after=after,
        blocks_before=total,
        blocks_after=total - removed,
        target=target,
        removed=removed / total,
    )


def compare_formats(source: Source, saved: Checkpoint) -> list[FormatReport]:
    """Say which quantised formats the shapes of the smaller and of the dense model fit."""
    small, dense = (
        format_fits(tuple(weight_OI.shape) for _, weight_OI in stored_linears(each))
        for each in (saved, source)
    )
    return [
        FormatReport(**now.model_dump(), fit_dense=before.fit)
        for now, before in zip(small, dense, strict=True)
    ]
