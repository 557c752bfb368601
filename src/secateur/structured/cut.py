"""Cut units out of the tensors of a sub-block, or put them back as zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.structured.units import SubBlock


def cut(sub_block: SubBlock, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Return the parameters that units lie in, with the kept units alone, in their old order.

    Args:
        sub_block: where its units lie.
        tensors: parameters of the dense block by name inside the block; others are ignored.
        kept: int64 indices of the units that stay.
    """
    small: dict[str, Tensor] = {}
    for axis in sub_block.axes:
        tensor = tensors[axis.parameter]
        positions = axis.positions_UP[kept].flatten().sort().values.to(tensor.device)
        small[axis.parameter] = tensor.index_select(axis.axis, positions)
    return small


def kept_columns(sub_block: SubBlock, kept: Tensor) -> Tensor:
    """Input columns of the output matrix that kept units have, in rising order."""
    return sub_block.columns_UP[kept].flatten().sort().values


def stored_output(sub_block: SubBlock, v_OK: Tensor) -> dict[str, Tensor]:
    """A cut output matrix as its module holds it, by name inside the block."""
    name = f"{sub_block.output}.weight"
    columns_last = next(axis.axis for axis in sub_block.axes if axis.parameter == name) == 1
    return {name: v_OK if columns_last else v_OK.T.contiguous()}


def pad(
    sub_block: SubBlock, small: Mapping[str, Tensor], kept: int, units: int
) -> dict[str, Tensor]:
    """Return cut parameters widened to ``units`` units, of which the last ones are zero.

    Args:
        sub_block: the dense sub-block.
        small: parameters as ``cut`` returns them; others are ignored.
        kept: number of units in it.
        units: number of units wanted, at least ``kept``.
    """
    wide: dict[str, Tensor] = {}
    for axis in sub_block.axes:
        tensor = small[axis.parameter]
        shape = list(tensor.shape)
        shape[axis.axis] = units * axis.positions_UP.shape[1]
        positions = _first_units(axis.positions_UP, units)[:kept]
        wide[axis.parameter] = tensor.new_zeros(shape).index_copy(
            axis.axis, positions.flatten().sort().values.to(tensor.device), tensor
        )
    return wide


def _first_units(positions_UP: Tensor, units: int) -> Tensor:
    """Positions that the first ``units`` units have in a parameter that holds only those."""
    order = positions_UP[:units].flatten().sort().values
    return torch.searchsorted(order, positions_UP[:units].contiguous())
