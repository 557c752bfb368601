"""What structured pruning can remove, and how to cut it out of the tensors of a block.

A unit is everything that goes together: a channel of a feed-forward, with its row in each input
projection and its column in the output projection; or a key-value head with the query heads that
read it, a group. Kept groups may also lose query heads, the same number each, since no
configuration knows more than one.

What is kept of a sub-block is an int64 tensor of indices: (units,), or where query heads went
(units, queries), a row of query heads for each kept group, numbered through all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from secateur.models.experts import stored_weights
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
    """How much of a sub-block is kept: units, and query heads in each, 0 in a feed-forward."""

    units: int
    queries: int


@dataclass(frozen=True)
class UnitAxis:
    """The axis of one parameter along which units lie.

    Attributes:
        parameter: its name inside the block.
        axis: the axis.
        size: numbers at one position along it.
        positions_UP: int64 (units, positions of each along the axis); those of the unit's query
            heads come first, head after head.
        head_positions: how many of them one query head has.
    """

    parameter: str
    axis: int
    size: int
    positions_UP: Tensor
    head_positions: int = 0


@dataclass(frozen=True, eq=False)
class SubBlock:
    """Attention or feed-forward of one block: where its units lie, whatever the family.

    Attributes:
        block: index of the block.
        kind: what it is.
        axes: of all parameters that the units have a part of.
        output: name inside the block of the linear whose input columns are the units.
        attention: name inside the block of the attention module; empty for a feed-forward.
        fixed: it keeps all its units, since the user left out one of its linears.
    """

    block: int
    kind: Kind
    axes: tuple[UnitAxis, ...]
    output: str
    attention: str = ""
    fixed: bool = False

    @property
    def label(self) -> str:
        """``3.attention``: short and unique in the model."""
        return f"{self.block}.{self.kind}"

    @cached_property
    def output_axis(self) -> UnitAxis:
        """Where the units lie in the weight of the output linear."""
        return next(axis for axis in self.axes if axis.parameter == f"{self.output}.weight")

    @property
    def columns_UP(self) -> Tensor:
        """Input columns of the output linear by unit, int64 (units, columns of each)."""
        return self.output_axis.positions_UP

    @property
    def units(self) -> int:
        """How many units it has."""
        return len(self.columns_UP)

    @property
    def head_dim(self) -> int:
        """Width of a head; 0 for a feed-forward."""
        return self.output_axis.head_positions

    @cached_property
    def heads_per_unit(self) -> int:
        """Query heads in a key-value group; 0 for a feed-forward."""
        return self.columns_UP.shape[1] // self.head_dim if self.head_dim else 0

    @cached_property
    def unit_parameters(self) -> int:
        """Parameters that one unit holds."""
        return sum(axis.size * axis.positions_UP.shape[1] for axis in self.axes)

    @cached_property
    def head_parameters(self) -> int:
        """Parameters that go with one query head alone."""
        return sum(axis.size * axis.head_positions for axis in self.axes)

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

    def removed(self, width: Width) -> int:
        """Parameters that a width lacks."""
        return self.parameters(self.whole) - self.parameters(width)

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

    def columns(self, kept: Tensor) -> Tensor:
        """Input columns of the output matrix that kept units have, rising."""
        return self.positions(self.output_axis, kept)

    def cut(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Return the parameters that units lie in, with the kept units alone, in their old order.

        ``tensors`` are those of the dense block by name inside it; others are ignored.
        """
        small: dict[str, Tensor] = {}
        for axis in self.axes:
            tensor = tensors[axis.parameter]
            positions = self.positions(axis, kept).to(tensor.device)
            small[axis.parameter] = tensor.index_select(axis.axis, positions)
        return small

    def pad(self, small: Mapping[str, Tensor], kept: Width, width: Width) -> dict[str, Tensor]:
        """Widen what ``cut`` returns from ``kept`` to ``width``, which is nowhere smaller.

        The last units, and of each the last query heads, are zero.
        """
        wide: dict[str, Tensor] = {}
        for axis in self.axes:
            tensor = small[axis.parameter]
            shape = list(tensor.shape)
            shape[axis.axis] = self.extent(axis, width)
            # Where the first units of the dense parameter are once the others are gone.
            places = torch.searchsorted(
                self.positions(axis, self.first(width)), self.positions(axis, self.first(kept))
            )
            wide[axis.parameter] = tensor.new_zeros(shape).index_copy(
                axis.axis, places.to(tensor.device), tensor
            )
        return wide

    def stored_output(self, v_OK: Tensor) -> dict[str, Tensor]:
        """A cut output matrix as its module holds it, by name inside the block."""
        axis = self.output_axis
        return {axis.parameter: v_OK if axis.axis == 1 else v_OK.T.contiguous()}

    def output_linear(self, block: nn.Module) -> Linear:
        """The linear of its dense block whose input columns are the units."""
        return next(linear for linear in find_linears(block) if linear.name == self.output)


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


def with_whole(sub_blocks: Sequence[SubBlock], widths: Iterable[Width]) -> list[Width]:
    """Widths of all sub-blocks, from those of the ones that are not fixed."""
    given = iter(widths)
    return [each.whole if each.fixed else next(given) for each in sub_blocks]


def find_sub_blocks(blocks: BlockList, *, ffn_only: bool = False) -> list[SubBlock]:
    """Return the sub-blocks of all blocks, attention before feed-forward.

    Those with a linear that is not among the chosen ones of the blocks are fixed.

    Raises:
        SecateurError: a feed-forward, or an attention unless ``ffn_only``, cannot be cut.
    """
    found: list[SubBlock] = []
    for index, block in enumerate(blocks):
        linears = find_linears(block)
        if len(stored_weights(block)) > len(linears):
            raise _feed_forward_refused(linears)
        name, attention = _find_attention(block)
        inside = set() if attention is None else set(attention.modules())
        if not ffn_only:
            parts = [linear for linear in linears if linear.module in inside]
            found.append(_attention(index, name, attention, parts))
        found.append(_feed_forward(index, [each for each in linears if each.module not in inside]))
    return [replace(each, fixed=_is_fixed(blocks, each)) for each in found]


def _is_fixed(blocks: BlockList, sub_block: SubBlock) -> bool:
    own = {axis.parameter.rpartition(".")[0] for axis in sub_block.axes}
    return not own <= {linear.name for linear in blocks.linears(sub_block.block)}


def attention_refused(reason: str) -> SecateurError:
    """The error for an attention that cannot be cut, with the way out."""
    return SecateurError(
        f"The attention of this family cannot be cut, {reason}; use --ffn-only to shrink "
        "the feed-forwards alone."
    )


def _head_dim(module: nn.Module) -> int:
    """Width of a head of an attention module, 0 for any other module."""
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if isinstance(size, int)), 0)


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
    if not hasattr(attention, "config"):
        raise attention_refused("its module does not hold the sizes of its heads as others do")
    head_dim = _head_dim(attention)
    output = leaves.pop(outputs[0])
    heads = output.weight_OI.shape[1] // head_dim
    sizes = {leaf: linear.weight_OI.shape[0] for leaf, linear in leaves.items()}
    axes: list[UnitAxis] = []
    for leaf, rows_UP in _rows_by_group(sizes, heads, head_dim).items():
        if rows_UP.numel() != sizes[leaf]:
            raise attention_refused(f"{leaf} does not hold whole heads of one key-value group each")
        axes += _row_axes(leaves[leaf], rows_UP, head_dim if leaf in _WITH_QUERIES else 0)
    columns_UP = torch.arange(heads * head_dim).view(len(axes[0].positions_UP), -1)
    axes.append(_column_axis(output, columns_UP, head_dim))
    return SubBlock(index, "attention", tuple(axes), output.name, name)


def _rows_by_group(sizes: Mapping[str, int], heads: int, head_dim: int) -> dict[str, Tensor]:
    """Rows of each input projection by key-value group; both are by the last part of its name."""
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


def _feed_forward_refused(linears: Sequence[Linear]) -> SecateurError:
    return SecateurError(
        "The feed-forward of this family cannot be cut, its linears "
        f"({', '.join(linear.name for linear in linears) or 'none are plain ones'}) do not lead "
        "to one hidden width and back; mixtures of experts are not supported."
    )


def _feed_forward(index: int, linears: Sequence[Linear]) -> SubBlock:
    refusal = _feed_forward_refused(linears)
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
    return SubBlock(index, "ffn", tuple(axes), output.name)


def _row_axes(linear: Linear, rows_UP: Tensor, head_rows: int = 0) -> list[UnitAxis]:
    axis, columns = int(linear.transposed), linear.weight_OI.shape[1]
    axes = [UnitAxis(f"{linear.name}.weight", axis, columns, rows_UP, head_rows)]
    if linear.bias_O is not None:
        axes.append(UnitAxis(f"{linear.name}.bias", 0, 1, rows_UP, head_rows))
    return axes


def _column_axis(linear: Linear, columns_UP: Tensor, head_columns: int = 0) -> UnitAxis:
    axis, rows = 1 - int(linear.transposed), linear.weight_OI.shape[0]
    return UnitAxis(f"{linear.name}.weight", axis, rows, columns_UP, head_columns)
