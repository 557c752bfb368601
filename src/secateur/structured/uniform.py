"""The widths that all blocks are cut to when they shall stay alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from secateur.errors import SecateurError
from secateur.structured.source import Source
from secateur.structured.stock import Widths, common_widths, stock_config
from secateur.structured.units import SubBlock


def uniform_widths(
    source: Source, sub_blocks: Sequence[SubBlock], budget: int, sparsity: float
) -> Widths:
    """Return widths for all blocks that remove as much of ``budget`` as they can.

    Attention loses as many groups as comes nearest to the wanted share, feed-forwards make up the
    rest to less than one channel per block. Only widths that a stock configuration has count.

    Args:
        source: the dense checkpoint.
        sub_blocks: its sub-blocks.
        budget: parameters to remove, not to be exceeded.
        sparsity: the share that they are of all in the blocks.

    Raises:
        SecateurError: no such widths exist.
    """
    dense = common_widths(sub_blocks)
    share = budget // len(source.blocks)
    costs = {each.kind: each.unit_parameters for each in sub_blocks}
    for groups in _by_distance(dense.groups, sparsity):
        gone = 0 if groups is None or dense.groups is None else dense.groups - groups
        rest = share - gone * costs.get("attention", 0)
        widths = Widths(groups, dense.channels - rest // costs["ffn"])
        if 0 < widths.channels <= dense.channels and stock_config(source, sub_blocks, widths):
            return widths
    raise SecateurError(
        f"No stock {source.config['model_type']} is smaller by {sparsity:.0%} of the parameters of "
        "its blocks with the same widths in all; remove less, or leave out --uniform."
    )


def _by_distance(groups: int | None, sparsity: float) -> Iterator[int | None]:
    """Numbers of groups to keep, from the nearest to the wanted share onwards."""
    if groups is None:
        yield None
        return
    wanted = groups * (1 - sparsity)
    yield from sorted(range(1, groups + 1), key=lambda count: (abs(count - wanted), -count))
