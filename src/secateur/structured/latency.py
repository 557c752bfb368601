"""What widths cost in time, measured on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.checkpoint.store import BlockStore
from secateur.errors import SecateurError
from secateur.structured.cut import cut
from secateur.structured.masking import installed
from secateur.structured.units import SubBlock
from secateur.walk.capture import BlockCall, capture

# Widths of a sub-block that are timed, evenly spread; those between lie on straight lines.
_KNOTS = 6
_REPEATS = 7


@dataclass(frozen=True)
class Timing:
    """Time of a forward pass, in nanoseconds.

    Attributes:
        costs: what each width of each sub-block takes more than none; never falling.
        total: of all dense blocks, with what is in no sub-block.
    """

    costs: list[list[int]]
    total: int

    def budget(self, share: float) -> int:
        """What the kept widths may cost, so that ``share`` of the total goes.

        Raises:
            SecateurError: sub-blocks take less time than that.
        """
        removable = sum(cost[-1] for cost in self.costs)
        budget = removable - round(share * self.total)
        if budget <= 0:
            raise SecateurError(
                f"Units take {removable / self.total:.1%} of the blocks' time on this machine, so "
                f"{share:.1%} cannot go; remove less, or count parameters."
            )
        return budget


@torch.no_grad()
def time_widths(
    store: BlockStore,
    sub_blocks: Sequence[SubBlock],
    grids: Sequence[Sequence[int]],
    tokens_L: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Timing:
    """Time blocks with narrower sub-blocks on a prefill, one sub-block at a time.

    Blocks of the same shapes take the same time, so one of each is measured, its weights in the
    dtype of products.

    Args:
        store: the dense model.
        sub_blocks: its sub-blocks.
        grids: widths of each of them, rising from none to all.
        tokens_L: the window of text.
        device: where to run.
        dtype: of weights and products.
    """
    with store.embeddings():
        captured = capture(store.blocks, tokens_L[None].to(device, torch.long))
    known: dict[tuple[tuple[str, int, int], ...], tuple[list[list[int]], int]] = {}
    costs: list[list[int]] = []
    total = 0
    for index in range(len(store.blocks)):
        parts = [part for part in zip(sub_blocks, grids, strict=True) if part[0].block == index]
        shapes = tuple((each.kind, each.units, each.unit_parameters) for each, _ in parts)
        if shapes not in known:
            # A copy, because weights and buffers of the store's own stay fp32.
            block = copy.deepcopy(store.load(index)).to(dtype)
            store.release(index)
            call = _in_dtype(captured.calls[index], dtype)
            known[shapes] = _time_block(block, call, captured.first_BLD.to(dtype), parts)
        costs += known[shapes][0]
        total += known[shapes][1]
    return Timing(costs, total)


def _time_block(
    block: nn.Module,
    call: BlockCall,
    x_BLD: Tensor,
    parts: Sequence[tuple[SubBlock, Sequence[int]]],
) -> tuple[list[list[int]], int]:
    """Costs of the widths of each sub-block, and time of the whole block."""
    knots = [_spread(grid) for _, grid in parts]
    least = [[float("inf")] * len(widths) for widths in knots]
    # All widths in turn, so that a slow spell of the machine is nobody's.
    for repeat in range(_REPEATS + 1):
        for part, (sub_block, _) in enumerate(parts):
            for knot, width in enumerate(knots[part]):
                seconds = _time(block, call, x_BLD, sub_block, width)
                # The first round warms up.
                if repeat:
                    least[part][knot] = min(least[part][knot], seconds)
    costs = []
    for (_, grid), widths, seconds_K in zip(parts, knots, least, strict=True):
        seconds_G = np.interp(grid, widths, seconds_K) - seconds_K[0]
        costs.append(list(accumulate((max(0, round(1e9 * s)) for s in seconds_G), max)))
    return costs, round(1e9 * min(seconds_K[-1] for seconds_K in least))


def _time(
    block: nn.Module, call: BlockCall, x_BLD: Tensor, sub_block: SubBlock, width: int
) -> float:
    own = {axis.parameter: block.get_parameter(axis.parameter) for axis in sub_block.axes}
    small = cut(sub_block, own, torch.arange(width))
    with installed(block, sub_block, small, width):
        _wait(x_BLD.device)
        started = time.perf_counter()
        call(block, x_BLD)
        _wait(x_BLD.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(grid: Sequence[int]) -> list[int]:
    """Some widths of a grid, the first and the last among them."""
    places = np.linspace(0, len(grid) - 1, min(_KNOTS, len(grid))).round().astype(int)
    return [grid[place] for place in places]


def _in_dtype(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """The same call with its floating tensors in another dtype."""

    def convert(value: object) -> object:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and isinstance(value, Tensor) else value

    return BlockCall(tree_map(convert, call.args), tree_map(convert, call.kwargs))
