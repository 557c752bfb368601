"""One pass over the dense blocks: what every width costs locally, and random sub-models alongside.

A block is in memory once. Its units are ordered there, and every sub-model goes through it with
its own widths, which are slices of that order, before the next block comes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from secateur.blocks.activations import allocate
from secateur.blocks.inputs import InputAccumulator, LinearGroup, observed_inputs
from secateur.blocks.streams import Stream
from secateur.models.store import BlockStore
from secateur.models.structure import Linear
from secateur.runs.progress import Progress, silent
from secateur.shrinking.cut import cut, kept_columns, stored_output
from secateur.shrinking.masking import installed
from secateur.shrinking.ordering import UnitOrder, order_units
from secateur.shrinking.output_fit import OutputFit, fit_output
from secateur.shrinking.sub_models import divergences
from secateur.shrinking.units import SubBlock, Width, output_linear


@dataclass(frozen=True)
class Trials:
    """Sub-models and what they are tried on.

    Attributes:
        places: for each sub-model the place of its width in each sub-block's grid.
        windows: the samples that it sees; the stream knows calls of as many.
        memory: bytes that hidden states of all of them may take before they go to a file.
    """

    places: Sequence[Sequence[int]]
    windows: slice
    memory: int


@dataclass(frozen=True)
class Survey:
    """What the pass found.

    Attributes:
        losses: of each sub-block and each width of its grid: squared change of its output, the
            kept units refitted, on held-out tokens, over the typical square of the hidden states
            that it is added to.
        divergences: of each sub-model, mean KL from the dense model in nats per token.
        tokens: that went through all blocks.
        notes: fallbacks that were needed.
    """

    losses: list[list[float]]
    divergences: list[float]
    tokens: int
    notes: list[str]


@torch.no_grad()
def survey(
    store: BlockStore,
    sub_blocks: Sequence[SubBlock],
    grids: Sequence[Sequence[Width]],
    tokens_SL: Tensor,
    stream: Stream,
    trials: Trials,
    progress: Progress = silent,
) -> Survey:
    """Order the units of every sub-block and try sub-models.

    Args:
        store: the dense model.
        sub_blocks: its sub-blocks.
        grids: widths whose losses are wanted, for each sub-block.
        tokens_SL: int64 (samples, length), the text of the stream.
        stream: hidden states before the first block; they end behind the last one.
        trials: the sub-models.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: weights or hidden states are not finite.
    """
    start_WLD = stream.x_SLD[trials.windows]
    # What sub-models differ by is far above the rounding of 16 bits, and memory is theirs mostly.
    states_NWLD = allocate(
        (len(trials.places), *start_WLD.shape), None, trials.memory, stream.dtype
    )
    states_NWLD.copy_(start_WLD.expand_as(states_NWLD))
    losses: list[list[float]] = []
    notes: list[str] = []
    for index in range(len(store.blocks)):
        block = store.load(index)
        parts = [number for number, each in enumerate(sub_blocks) if each.block == index]
        own = [grids[part] for part in parts]
        nested, energy = _order_units(block, [sub_blocks[part] for part in parts], own, stream)
        for part, each in zip(parts, nested, strict=True):
            tried = {row[part] for row in trials.places}
            losses.append([loss / energy for loss in each.losses(grids[part], tried)])
            notes += [f"{each.sub_block.label}: {note}" for note in each.order.notes]
        widths = [tuple(grids[part][row[part]] for part in parts) for row in trials.places]
        _run_sub_models(block, nested, widths, stream, states_NWLD)
        stream.position += 1
        store.release(index)
        progress("Trying widths", index + 1, len(store.blocks))
    with store.head():
        found = divergences(
            store.blocks,
            tokens_SL[trials.windows],
            stream.x_SLD[trials.windows],
            states_NWLD,
            stream.device,
            stream.dtype,
        )
    return Survey(losses, found, tokens_SL.numel() + states_NWLD[..., 0].numel(), notes)


@dataclass
class _Nested:
    """A dense sub-block whose units are in order."""

    block: nn.Module
    sub_block: SubBlock
    weight_OI: Tensor
    fitted_II: Tensor
    held_out_II: Tensor
    order: UnitOrder
    _fits: dict[Width, OutputFit] = field(default_factory=dict)

    def fit(self, width: Width) -> OutputFit:
        """Its output matrix at a width."""
        if width not in self._fits:
            kept = self.order.kept(width)
            columns_K = kept_columns(self.sub_block, kept).to(self.weight_OI.device)
            self._fits[width] = fit_output(
                self.weight_OI, self.fitted_II, self.held_out_II, columns_K
            )
        return self._fits[width]

    def narrowed(self, width: Width) -> dict[str, Tensor]:
        """Its parameters at a width."""
        axes = self.sub_block.axes
        own = {axis.parameter: self.block.get_parameter(axis.parameter) for axis in axes}
        small = cut(self.sub_block, own, self.order.kept(width))
        return small | stored_output(self.sub_block, self.fit(width).v_OK)

    def losses(self, grid: Sequence[Width], tried: Collection[int]) -> list[float]:
        """Held-out loss of each width of the grid, nothing for the last, which is all.

        It is measured at the widths that sub-models have, given as places in the grid. Between
        them the loss on fitted tokens, which every width has, is scaled as it is at their ends.
        """
        fitted = self.order.losses(self.weight_OI, self.fitted_II, grid[:-1])
        fitted = [max(loss, sys.float_info.min) for loss in fitted]
        measured = sorted(place for place in {0, *tried} if place < len(fitted))
        factors = [self.fit(grid[place]).loss / fitted[place] for place in measured]
        scales = np.interp(range(len(fitted)), measured, factors).tolist()
        return [*(loss * scale for loss, scale in zip(fitted, scales, strict=True)), 0.0]


def _order_units(
    block: nn.Module,
    sub_blocks: Sequence[SubBlock],
    grids: Sequence[Sequence[Width]],
    stream: Stream,
) -> tuple[list[_Nested], float]:
    """Carry the stream through a dense block and order its units; also the typical |x|² behind it.

    That is the geometric mean over tokens, since a few of them have huge hidden states.
    """
    outputs = [output_linear(block, each) for each in sub_blocks]
    fitted_II, energy = _advance(block, outputs, stream, stream.batches.fitted)
    held_out_II, _ = _advance(block, outputs, stream, stream.batches.held_out)
    nested = []
    for sub_block, linear, grid, gram_II, other_II in zip(
        sub_blocks, outputs, grids, fitted_II, held_out_II, strict=True
    ):
        weight_OI = linear.weight_OI.float()
        queries = any(width.queries < sub_block.heads_per_unit for width in grid)
        order = order_units(sub_block, weight_OI, gram_II, queries=queries)
        nested.append(_Nested(block, sub_block, weight_OI, gram_II, other_II, order))
    return nested, energy


def _advance(
    block: nn.Module, outputs: Sequence[Linear], stream: Stream, batches: Sequence[slice]
) -> tuple[list[Tensor], float]:
    """Carry batches through a block: Gram matrices before its outputs, typical |x|² behind it."""
    sums = [
        InputAccumulator(each.weight_OI.shape[1], "gram", stream.device, stream.dtype)
        for each in outputs
    ]
    groups = [LinearGroup((each,)) for each in outputs]
    logarithm, tokens = 0.0, 0
    with observed_inputs(groups, lambda place, x_NI: sums[place].add(x_NI)):
        for batch in batches:
            square_BL = stream.advance(block, batch).square().sum(-1)
            square_BL.clamp_min_(torch.finfo(square_BL.dtype).tiny)
            logarithm += float(square_BL.log().sum(dtype=torch.float64))
            tokens += square_BL.numel()
    return [each.gram() for each in sums], math.exp(logarithm / tokens)


def _run_sub_models(
    block: nn.Module,
    nested: Sequence[_Nested],
    widths: Sequence[tuple[Width, ...]],
    stream: Stream,
    states_NWLD: Tensor,
) -> None:
    """Carry every sub-model through the block; those of the same widths share their weights."""
    order = sorted(range(len(widths)), key=lambda number: widths[number])
    for wanted, members in groupby(order, key=lambda number: widths[number]):
        with ExitStack() as stack:
            for each, width in zip(nested, wanted, strict=True):
                if width != each.sub_block.whole:
                    small = each.narrowed(width)
                    stack.enter_context(installed(block, each.sub_block, small, width))
            for number in members:
                x_WLD = states_NWLD[number].to(stream.device, torch.float32)
                states_NWLD[number].copy_(stream.call(block, x_WLD))
