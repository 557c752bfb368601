"""What widths cost in time, measured on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.blocks.streams import loaded_blocks
from secateur.models.capture import BlockCall, capture
from secateur.models.store import BlockStore
from secateur.runs.errors import SecateurError
from secateur.shrinking.sub_models import cut_to
from secateur.shrinking.units import SubBlock, Width
from secateur.shrinking.widths import nested_places

# Numbers of units, and of query heads, that are timed, evenly spread; what lies between them is on
# straight lines.
_KNOTS = 6
_QUERY_KNOTS = 3
_REPEATS = 7


@dataclass(frozen=True)
class Timing:
    """Time of a forward pass, in nanoseconds.

    Attributes:
        costs: of each width of each sub-block, beyond that of none; no width takes less than one
            that is part of it.
        total: of all dense blocks, with what is in no sub-block.
    """

    costs: list[list[int]]
    total: int

    def budget(self, share: float) -> int:
        """What the kept widths may cost, so that ``share`` of the total goes; an error if none."""
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
    grids: Sequence[Sequence[Width]],
    tokens_L: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Timing:
    """Time blocks with one narrower sub-block on a prefill of one window of text.

    Blocks of the same shapes take the same time, so one of each is measured, with weights and
    products in ``dtype``. Grids have none first and all last.
    """
    with store.embeddings():
        captured = capture(store.blocks, tokens_L[None].to(device, torch.long))
    parts = [
        [part for part in zip(sub_blocks, grids, strict=True) if part[0].block == index]
        for index in range(len(store.blocks))
    ]
    shapes = [
        tuple((each.kind, *each.whole, each.unit_parameters) for each, _ in own) for own in parts
    ]
    first = [shapes.index(shape) for shape in shapes]
    found = {
        # A copy, because weights and buffers of the store's own stay fp32.
        index: _time_block(
            copy.deepcopy(block).to(dtype),
            _in_dtype(captured.calls[index], dtype),
            captured.first_BLD.to(dtype),
            parts[index],
        )
        for index, _, block in loaded_blocks(store, sorted(set(first)))
    }
    costs = [cost for index in first for cost in found[index][0]]
    return Timing(costs, sum(found[index][1] for index in first))


def _time_block(
    block: nn.Module,
    call: BlockCall,
    x_BLD: Tensor,
    parts: Sequence[tuple[SubBlock, Sequence[Width]]],
) -> tuple[list[list[int]], int]:
    """Costs of the widths of each sub-block, and time of the whole block."""
    least = [dict.fromkeys(_knots(grid), float("inf")) for _, grid in parts]
    whole = float("inf")
    # All widths in turn, so that a slow spell of the machine is nobody's.
    for repeat in range(_REPEATS + 1):
        took = _time(block, call, x_BLD)
        # The first round warms up.
        if repeat:
            whole = min(whole, took)
        for (sub_block, _), seconds in zip(parts, least, strict=True):
            for width in seconds:
                with cut_to(block, sub_block, sub_block.first(width)):
                    took = _time(block, call, x_BLD)
                if repeat:
                    seconds[width] = min(seconds[width], took)
    costs = [_costs(grid, seconds) for (_, grid), seconds in zip(parts, least, strict=True)]
    return costs, round(1e9 * whole)


def _time(block: nn.Module, call: BlockCall, x_BLD: Tensor) -> float:
    _wait(x_BLD.device)
    started = time.perf_counter()
    call(block, x_BLD)
    _wait(x_BLD.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _knots(grid: Sequence[Width]) -> list[Width]:
    """The widths of a grid that are timed, its ends among them."""
    _, *units = _spread(sorted({width.units for width in grid}), _KNOTS)
    queries = _spread(sorted({width.queries for width in grid[1:]}), _QUERY_KNOTS)
    return [grid[0], *(Width(*each) for each in product(units, queries))]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def _costs(grid: Sequence[Width], seconds: Mapping[Width, float]) -> list[int]:
    """Nanoseconds of each width more than none, from those of the knots."""
    none, *timed = seconds
    places_QU = nested_places(grid)
    knots_Q = sorted({width.queries for width in timed})
    knots_U = [0, *sorted({width.units for width in timed})]
    queries_Q = [grid[place].queries for place in places_QU[:, 0]]
    units_U = [grid[place].units for place in places_QU[0]]
    rows = []
    for queries in knots_Q:
        measured = [seconds[Width(units, queries)] for units in knots_U[1:]]
        rows.append(np.interp(units_U, knots_U, [seconds[none], *measured]))
    columns = [np.interp(queries_Q, knots_Q, seconds_Q) for seconds_Q in zip(*rows, strict=True)]
    extra_QU = np.array(columns).T - seconds[none]
    cost_QU = np.maximum(0, np.rint(1e9 * extra_QU)).astype(np.int64)
    cost_G = np.zeros(len(grid), np.int64)
    cost_G[places_QU] = np.maximum.accumulate(np.maximum.accumulate(cost_QU, axis=0), axis=1)
    found: list[int] = cost_G.tolist()
    return found


def _in_dtype(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """The same call with its floating tensors in another dtype."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        return value

    return BlockCall(tree_map(convert, call.args), tree_map(convert, call.kwargs))
