"""Cut units out of the tensors of a sub-block, or put them back as zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.shrinking.units import SubBlock, Width


def cut(sub_block: SubBlock, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Return the parameters that units lie in, with the kept units alone, in their old order.

    Args:
        sub_block: where its units lie.
        tensors: parameters of the dense block by name inside the block; others are ignored.
        kept: what stays, as ``units`` has it.
    """
    small: dict[str, Tensor] = {}
    for axis in sub_block.axes:
        tensor = tensors[axis.parameter]
        positions = sub_block.positions(axis, kept).to(tensor.device)
        small[axis.parameter] = tensor.index_select(axis.axis, positions)
    return small


def kept_columns(sub_block: SubBlock, kept: Tensor) -> Tensor:
    """Input columns of the output matrix that kept units have, in rising order."""
    return sub_block.positions(sub_block.output_axis, kept)


def stored_output(sub_block: SubBlock, v_OK: Tensor) -> dict[str, Tensor]:
    """A cut output matrix as its module holds it, by name inside the block."""
    axis = sub_block.output_axis
    return {axis.parameter: v_OK if axis.axis == 1 else v_OK.T.contiguous()}


def pad(
    sub_block: SubBlock, small: Mapping[str, Tensor], kept: Width, width: Width
) -> dict[str, Tensor]:
    """Return cut parameters widened; the last units, and of each the last query heads, are zero.

    Args:
        sub_block: the dense sub-block.
        small: parameters as ``cut`` returns them; others are ignored.
        kept: the width that they have.
        width: the width wanted, in nothing below ``kept``.
    """
    wide: dict[str, Tensor] = {}
    for axis in sub_block.axes:
        tensor = small[axis.parameter]
        shape = list(tensor.shape)
        shape[axis.axis] = sub_block.extent(axis, width)
        # Where the first units of the dense parameter are once the others are gone.
        places = torch.searchsorted(
            sub_block.positions(axis, sub_block.first(width)),
            sub_block.positions(axis, sub_block.first(kept)),
        )
        wide[axis.parameter] = tensor.new_zeros(shape).index_copy(
            axis.axis, places.to(tensor.device), tensor
        )
    return wide
