"""The widths that all blocks are cut to when they shall stay alike."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.runs.errors import SecateurError
from secateur.shrinking.source import Source
from secateur.shrinking.stock import Widths, common_widths, stock_config
from secateur.shrinking.units import SubBlock, Width


def uniform_widths(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    budget: int,
    sparsity: float,
    *,
    whole_groups: bool,
) -> Widths:
    """Return widths for all blocks that remove as much of ``budget`` as they can.

    Attention loses groups, and query heads of each, so that what it loses comes nearest to the
    wanted share; feed-forwards make up the rest to less than one channel per block. Only widths
    that a stock configuration has count.

    Args:
        source: the dense checkpoint.
        sub_blocks: its sub-blocks.
        budget: parameters to remove, not to be exceeded.
        sparsity: the share that they are of all in the blocks.
        whole_groups: leave kept groups all their query heads.

    Raises:
        SecateurError: no such widths exist.
    """
    dense = common_widths(sub_blocks)
    share = budget // len(source.blocks)
    first = {each.kind: each for each in sub_blocks if each.block == 0}
    choices: Sequence[Width | None] = [None]
    if dense.attention is not None:
        choices = _by_distance(first["attention"], sparsity, whole_groups)
    for attention in choices:
        gone = 0 if attention is None else _removed(first["attention"], attention)
        removed = (share - gone) // first["ffn"].unit_parameters
        widths = Widths(attention, dense.channels - removed)
        if 0 < widths.channels <= dense.channels and stock_config(source, sub_blocks, widths):
            return widths
    raise SecateurError(
        f"No stock {source.config['model_type']} is smaller by {sparsity:.0%} of the parameters of "
        "its blocks with the same widths in all; remove less, or leave out --uniform."
    )


def _by_distance(attention: SubBlock, sparsity: float, whole_groups: bool) -> list[Width]:
    """Widths from the nearest to the wanted share onwards; of two alike the smaller cache."""
    queries = attention.heads_per_unit if whole_groups else 1
    whole = attention.parameters(attention.whole)

    def distance(width: Width) -> tuple[float, int]:
        gone = _removed(attention, width)
        return round(abs(gone / whole - sparsity), 9), gone

    return sorted(attention.widths_from(Width(1, queries)), key=distance)


def _removed(attention: SubBlock, width: Width) -> int:
    return attention.parameters(attention.whole) - attention.parameters(width)
