"""What structured pruning can remove: channels of feed-forwards, key-value groups of attention.

A unit is everything that goes together: a channel with its row in each input projection and its
column in the output projection, a key-value head with the query heads that read it. Kept groups may
also lose query heads, the same number each, since no configuration knows more than one. A sub-block
says for each of its parameters which positions along which axis belong to which unit; cutting is
then the same for every family, fused projections and biases included.

What is kept of a sub-block is a tensor of indices: int64 (units,), or where query heads went
(units, queries), a row of query heads for each kept group, numbered through all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList, Linear, find_linears
from secateur.runs.errors import SecateurError

Kind = Literal["attention", "ffn"]

_OUTPUTS = frozenset({"o_proj", "out_proj", "c_proj", "dense"})
_SEPARATE = frozenset({"q_proj", "k_proj", "v_proj"})
# All queries, then all keys, then all values; or query, key and value of one head after the other.
_JOINED = frozenset({"qkv_proj", "c_attn"})
_INTERLEAVED = frozenset({"query_key_value"})
# Those where the queries of a group come first and without its keys between them.
_WITH_QUERIES = _JOINED | {"q_proj"}


class Width(NamedTuple):
    """How much of a sub-block is kept.

    Attributes:
        units: how many units.
        queries: query heads in each of them; 0 in a feed-forward.
    """

    units: int
    queries: int


@dataclass(frozen=True)
class UnitAxis:
    """The axis of one parameter along which units lie.

    Attributes:
        linear: name of the linear inside the block.
        parameter: name of the parameter inside the block.
        axis: the axis.
        positions_UP: int64 (units, positions of each along the axis); those of the unit's query
            heads come first, head after head.
        head_positions: how many of them one query head has.
    """

    linear: str
    parameter: str
    axis: int
    positions_UP: Tensor
    head_positions: int = 0


@dataclass(frozen=True, eq=False)
class SubBlock:
    """Attention or feed-forward of one block, and its units.

    Attributes:
        block: index of the block.
        kind: what it is.
        units: how many units it has.
        unit_parameters: parameters that one unit holds.
        head_parameters: parameters that go with one query head alone.
        axes: where the units lie in each parameter.
        output: name inside the block of the linear whose input columns are the units.
        attention: name inside the block of the attention module; empty for a feed-forward.
        heads_per_unit: query heads in a key-value group; 0 for a feed-forward.
        head_dim: width of a head; 0 for a feed-forward.
    """

    block: int
    kind: Kind
    units: int
    unit_parameters: int
    head_parameters: int
    axes: tuple[UnitAxis, ...]
    output: str
    attention: str = ""
    heads_per_unit: int = 0
    head_dim: int = 0

    @property
    def output_axis(self) -> UnitAxis:
        """Where the units lie in the weight of the output linear."""
        return next(axis for axis in self.axes if axis.parameter == f"{self.output}.weight")

    @property
    def columns_UP(self) -> Tensor:
        """Input columns of the output linear by unit, int64 (units, columns of each)."""
        return self.output_axis.positions_UP

    @property
    def whole(self) -> Width:
        """The width of the dense sub-block."""
        return Width(self.units, self.heads_per_unit)

    def width_of(self, kept: Tensor) -> Width:
        """The width that kept units, or query heads, make."""
        return Width(len(kept), self.heads_per_unit if kept.ndim == 1 else kept.shape[1])

    def first(self, width: Width) -> Tensor:
        """The first units, and of each the first query heads, that make a width."""
        units_K = torch.arange(width.units)
        if width.queries == self.heads_per_unit:
            return units_K
        return units_K[:, None] * self.heads_per_unit + torch.arange(width.queries)

    def widths_from(self, least: Width) -> list[Width]:
        """Widths from ``least`` to the whole, rising in parameters; of two alike fewer units."""
        units = range(least.units, self.units + 1)
        queries = range(least.queries, self.heads_per_unit + 1)
        return sorted((Width(*each) for each in product(units, queries)), key=self.parameters)

    def parameters(self, width: Width) -> int:
        """Parameters that units hold at a width."""
        gone = self.heads_per_unit - width.queries
        return width.units * (self.unit_parameters - gone * self.head_parameters)

    def extent(self, axis: UnitAxis, width: Width) -> int:
        """Positions along an axis at a width."""
        gone = self.heads_per_unit - width.queries
        return width.units * (axis.positions_UP.shape[1] - gone * axis.head_positions)

    def positions(self, axis: UnitAxis, kept: Tensor) -> Tensor:
        """Positions along an axis that are kept, int64, rising."""
        if kept.ndim == 1:
            return axis.positions_UP[kept].flatten().sort().values
        of_heads = self.heads_per_unit * axis.head_positions
        heads_HP, rest_UP = axis.positions_UP.tensor_split([of_heads], dim=1)
        heads_HP = heads_HP.reshape(self.units * self.heads_per_unit, axis.head_positions)
        own = heads_HP[kept.flatten()].flatten()
        rest = rest_UP[kept[:, 0] // self.heads_per_unit].flatten()
        return torch.cat([own, rest]).sort().values

    @property
    def label(self) -> str:
        """``3.attention``: short and unique in the model."""
        return f"{self.block}.{self.kind}"


def find_sub_blocks(blocks: BlockList, *, ffn_only: bool = False) -> list[SubBlock]:
    """Return the sub-blocks that can be cut, attention before feed-forward in each block.

    Raises:
        SecateurError: a feed-forward, or an attention unless ``ffn_only``, is built in a way that
            cutting does not know; nothing would be left to do for the user but to leave it alone.
    """
    found: list[SubBlock] = []
    for index, block in enumerate(blocks):
        linears = find_linears(block)
        name, attention = _find_attention(block)
        inside = set() if attention is None else set(attention.modules())
        if not ffn_only:
            parts = [linear for linear in linears if linear.module in inside]
            found.append(_attention(index, name, attention, parts))
        found.append(_feed_forward(index, [each for each in linears if each.module not in inside]))
    return found


def block_parameters(blocks: BlockList) -> int:
    """Parameters of all blocks, norms and biases included: what a target share refers to."""
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def kept_parameters(sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor]) -> int:
    """Parameters that the kept units hold together."""
    return sum(
        sub_block.parameters(sub_block.width_of(units))
        for sub_block, units in zip(sub_blocks, kept, strict=True)
    )


def all_units(sub_blocks: Sequence[SubBlock]) -> list[Tensor]:
    """Indices of every unit of each sub-block: the dense model."""
    return [torch.arange(sub_block.units) for sub_block in sub_blocks]


def output_linear(block: nn.Module, sub_block: SubBlock) -> Linear:
    """The linear of a dense block whose input columns are the units."""
    return next(linear for linear in find_linears(block) if linear.name == sub_block.output)


def attention_refused(reason: str) -> SecateurError:
    """The error for an attention that cannot be cut, with the way out."""
    return SecateurError(
        f"The attention of this family cannot be cut, {reason}; use --ffn-only to shrink "
        "the feed-forwards alone."
    )


def _head_dim(module: nn.Module) -> int:
    """Width of a head of an attention module, 0 for any other module."""
    for name in ("head_dim", "head_size"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def _find_attention(block: nn.Module) -> tuple[str, nn.Module | None]:
    for name, module in block.named_modules():
        if name and _head_dim(module) and find_linears(module):
            return name, module
    return "", None


def _attention(
    index: int, name: str, attention: nn.Module | None, linears: Sequence[Linear]
) -> SubBlock:
    leaves = {linear.name.rpartition(".")[2]: linear for linear in linears}
    outputs = [leaf for leaf in leaves if leaf in _OUTPUTS]
    if attention is None or len(outputs) != 1:
        raise attention_refused("it has no single output projection beside its inputs")
    head_dim = _head_dim(attention)
    output = leaves.pop(outputs[0])
    heads = output.weight_OI.shape[1] // head_dim
    rows = _rows_by_group(
        {leaf: each.weight_OI.shape[0] for leaf, each in leaves.items()}, heads, head_dim
    )
    for leaf, rows_UP in rows.items():
        if rows_UP.numel() != leaves[leaf].weight_OI.shape[0]:
            raise attention_refused(f"{leaf} does not hold whole heads of one key-value group each")
    axes = [
        axis
        for leaf, rows_UP in rows.items()
        for axis in _row_axes(leaves[leaf], rows_UP, head_dim if leaf in _WITH_QUERIES else 0)
    ]
    groups = len(axes[0].positions_UP)
    columns_UP = torch.arange(heads * head_dim).view(groups, -1)
    axes.append(_column_axis(output, columns_UP, head_dim))
    return SubBlock(
        block=index,
        kind="attention",
        units=groups,
        unit_parameters=_parameters(linears, [(axis, axis.positions_UP.shape[1]) for axis in axes]),
        head_parameters=_parameters(linears, [(axis, axis.head_positions) for axis in axes]),
        axes=tuple(axes),
        output=output.name,
        attention=name,
        heads_per_unit=heads // groups,
        head_dim=head_dim,
    )


def _rows_by_group(sizes: Mapping[str, int], heads: int, head_dim: int) -> dict[str, Tensor]:
    """Rows of each input projection by key-value group.

    Args:
        sizes: rows of the input projections in all, by the last part of their names.
        heads: number of query heads.
        head_dim: width of a head.
    """
    if sizes.keys() == _SEPARATE:
        queries_UP, keys_UP = _head_positions(heads, sizes["k_proj"] // head_dim, head_dim)
        return {"q_proj": queries_UP, "k_proj": keys_UP, "v_proj": keys_UP}
    if len(sizes) == 1:
        ((leaf, size),) = sizes.items()
        if leaf in _JOINED:
            groups = (size // head_dim - heads) // 2
            queries_UP, keys_UP = _head_positions(heads, groups, head_dim)
            first, second = heads * head_dim, (heads + groups) * head_dim
            return {leaf: torch.cat([queries_UP, first + keys_UP, second + keys_UP], dim=1)}
        if leaf in _INTERLEAVED:
            return {leaf: torch.arange(3 * heads * head_dim).view(heads, 3 * head_dim)}
    raise attention_refused(f"its input projections are {', '.join(sorted(sizes))}")


def _head_positions(heads: int, groups: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of queries and of keys by key-value group."""
    if groups < 1 or heads % groups:
        raise attention_refused(f"its {heads} heads do not divide among {groups} key-value heads")
    queries_UP = torch.arange(heads * head_dim).view(groups, -1)
    return queries_UP, torch.arange(groups * head_dim).view(groups, head_dim)


def _feed_forward(index: int, linears: Sequence[Linear]) -> SubBlock:
    refusal = SecateurError(
        "The feed-forward of this family cannot be cut, its linears "
        f"({', '.join(linear.name for linear in linears) or 'none are plain ones'}) do not lead "
        "to one hidden width and back; mixtures of experts are not supported."
    )
    if len(linears) < 2:
        raise refusal
    *inputs, output = linears
    hidden, width = output.weight_OI.shape
    axes: list[UnitAxis] = []
    for linear in inputs:
        rows, columns = linear.weight_OI.shape
        if columns != hidden or rows not in (width, 2 * width):
            raise refusal
        # Gate and up projection in one matrix lie one behind the other.
        axes += _row_axes(linear, torch.arange(rows).view(-1, width).T)
    axes.append(_column_axis(output, torch.arange(width).view(-1, 1)))
    return SubBlock(
        block=index,
        kind="ffn",
        units=width,
        unit_parameters=_parameters(linears, [(axis, axis.positions_UP.shape[1]) for axis in axes]),
        head_parameters=0,
        axes=tuple(axes),
        output=output.name,
    )


def _row_axes(linear: Linear, rows_UP: Tensor, head_rows: int = 0) -> list[UnitAxis]:
    name, axis = f"{linear.name}.weight", int(linear.transposed)
    axes = [UnitAxis(linear.name, name, axis, rows_UP, head_rows)]
    if linear.bias_O is not None:
        axes.append(UnitAxis(linear.name, f"{linear.name}.bias", 0, rows_UP, head_rows))
    return axes


def _column_axis(linear: Linear, columns_UP: Tensor, head_columns: int = 0) -> UnitAxis:
    name, axis = f"{linear.name}.weight", 1 - int(linear.transposed)
    return UnitAxis(linear.name, name, axis, columns_UP, head_columns)


def _parameters(linears: Sequence[Linear], counts: Sequence[tuple[UnitAxis, int]]) -> int:
    """Parameters at so many positions along each of some axes."""
    parameters = {
        f"{linear.name}.{name}": parameter
        for linear in linears
        for name, parameter in linear.module.named_parameters()
    }
    return sum(
        count * (parameters[axis.parameter].numel() // parameters[axis.parameter].shape[axis.axis])
        for axis, count in counts
    )
