"""What is left of a model, in the terms of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.models.reader import CheckpointReader
from secateur.report.documents.shrink import ParameterReport, SubBlockReport
from secateur.runs.errors import SecateurError
from secateur.shrinking.source import Source
from secateur.shrinking.units import (
    SubBlock,
    Width,
    all_units,
    block_parameters,
    kept_parameters,
)


def describe_sub_block(sub_block: SubBlock, width: Width, **others: Any) -> SubBlockReport:
    """Say what is left of a sub-block, and what else is known of it."""
    return SubBlockReport(
        block=sub_block.block,
        kind=sub_block.kind,
        kept=width.units,
        of=sub_block.units,
        queries=width.queries or None,
        queries_of=sub_block.heads_per_unit or None,
        parameters=sub_block.parameters(width),
        **others,
    )


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

    def in_files(reader: CheckpointReader) -> int:
        return sum(torch.Size(shape).numel() for shape in reader.shapes.values())

    total = block_parameters(source.blocks)
    dense = kept_parameters(sub_blocks, all_units(sub_blocks))
    removed = dense - kept_parameters(sub_blocks, kept)
    before, after = in_files(source.reader), in_files(saved)
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
