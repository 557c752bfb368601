"""One pass over the dense blocks: what every width costs locally, and random sub-models alongside.

A block is in memory once. Its units are ordered there, and every sub-model goes through it with
its own widths, which are slices of that order, before the next block comes.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from secateur.blocks.inputs import InputAccumulator, LinearGroup, observed_inputs
from secateur.blocks.streams import Stream, allocate, loaded_blocks
from secateur.models.store import BlockStore
from secateur.models.structure import Linear
from secateur.report.documents.shrink import SurveyReport
from secateur.runs.progress import Progress, silent
from secateur.shrinking.ordering import OutputFit, UnitOrder, order_units
from secateur.shrinking.sub_models import cut_to, divergences
from secateur.shrinking.units import SubBlock, Width
from secateur.shrinking.widths import Penalties, fit_penalties, fitting


@dataclass(frozen=True)
class Survey:
    """What the pass found of every width of every sub-block.

    Attributes:
        grids: widths of each sub-block.
        fits: which of them may be chosen (``fitting``); the others are tried alone.
        places: for each sub-model the place of its width in each grid.
        losses: of each width: squared change of the sub-block's output, the kept units refitted, on
            held-out tokens, over the typical square of the hidden states that it is added to.
        divergences: of each sub-model, mean KL from the dense model in nats per token.
        trial_tokens: that each sub-model was tried on.
        tokens: that went through all blocks.
        fallbacks: that were needed, as sentences.
    """

    grids: Sequence[Sequence[Width]]
    fits: Sequence[Sequence[bool]]
    places: Sequence[Sequence[int]]
    losses: list[list[float]]
    divergences: list[float]
    trial_tokens: int
    tokens: int
    fallbacks: list[str]

    @cached_property
    def penalties(self) -> Penalties:
        """The divergence that each width is expected to cause."""
        found = fit_penalties(self.grids, self.losses, self.places, self.divergences)
        return found.only(self.fits)

    @property
    def notes(self) -> list[str]:
        """For the user: fallbacks, and whether the expected divergences deserve trust."""
        explained = self.penalties.explained
        if explained is not None and explained > 0:
            return self.fallbacks
        return [
            *self.fallbacks,
            "Do not trust the expected divergences, a fit to the other sub-models foretells those "
            "of a sub-model no better than their mean does; give more --sub-models or text.",
        ]

    def report(self, predicted: float) -> SurveyReport:
        """How the sub-models did; ``predicted`` is the divergence of the chosen widths."""
        finite = [value for value in self.divergences if math.isfinite(value)]
        return SurveyReport(
            sub_models=len(self.divergences),
            tokens=self.trial_tokens,
            divergence_mean=statistics.fmean(finite),
            divergence_deviation=statistics.pstdev(finite),
            not_finite=len(self.divergences) - len(finite),
            explained=self.penalties.explained,
            predicted_divergence=predicted,
        )


@torch.no_grad()
def survey(
    store: BlockStore,
    sub_blocks: Sequence[SubBlock],
    grids: Sequence[Sequence[Width]],
    places: Sequence[Sequence[int]],
    tokens_SL: Tensor,
    windows: slice,
    stream: Stream,
    memory: int,
    progress: Progress = silent,
) -> Survey:
    """Order the units of every sub-block, and try sub-models on some windows of the text.

    The stream starts before the first block and ends behind the last one; it knows calls of as many
    sequences as there are windows. Beyond ``memory`` bytes the sub-models' hidden states are in a
    file.

    Raises:
        SecateurError: weights or hidden states are not finite.
    """
    start_WLD = stream.x_SLD[windows]
    # What sub-models differ by is far above the rounding of 16 bits, and memory is theirs mostly.
    states_NWLD = allocate((len(places), *start_WLD.shape), None, memory, stream.dtype)
    states_NWLD.copy_(start_WLD.expand_as(states_NWLD))
    losses: list[list[float]] = []
    fallbacks: list[str] = []
    for index, _, block in loaded_blocks(store):
        parts = [number for number, each in enumerate(sub_blocks) if each.block == index]
        own = [grids[part] for part in parts]
        orders, held_out_II, energy = _order_units(
            block, [sub_blocks[part] for part in parts], own, stream
        )
        fits: list[dict[Width, OutputFit]] = []
        for order, other_II, grid, part in zip(orders, held_out_II, own, parts, strict=True):
            tried = {grid[0], *(grid[row[part]] for row in places)} - {grid[-1]}
            fits.append({width: order.fit(width, other_II) for width in tried})
            losses.append([loss / energy for loss in _held_out_losses(order, grid, fits[-1])])
            fallbacks += [f"{order.sub_block.label}: {note}" for note in order.notes]
        widths = [tuple(grids[part][row[part]] for part in parts) for row in places]
        _run_sub_models(block, orders, fits, widths, stream, states_NWLD)
        stream.position += 1
        progress("Trying widths", index + 1, len(store.blocks))
    with store.head():
        found = divergences(
            store.blocks,
            tokens_SL[windows],
            stream.x_SLD[windows],
            states_NWLD,
            stream.device,
            stream.dtype,
            progress,
        )
    trial_tokens = tokens_SL[windows].numel()
    tokens = tokens_SL.numel() + len(places) * trial_tokens
    may_be = [fitting(*part) for part in zip(sub_blocks, grids, strict=True)]
    return Survey(grids, may_be, places, losses, found, trial_tokens, tokens, fallbacks)


def _order_units(
    block: nn.Module,
    sub_blocks: Sequence[SubBlock],
    grids: Sequence[Sequence[Width]],
    stream: Stream,
) -> tuple[list[UnitOrder], list[Tensor], float]:
    """Carry the stream through a dense block and order its units.

    Returns:
        the orders, Gram matrices of held-out text, and the typical |x|² behind the block: the
        geometric mean over tokens, since a few of them have huge hidden states.
    """
    outputs = [each.output_linear(block) for each in sub_blocks]
    fitted_II, energy = _advance(block, outputs, stream, stream.batches.fitted)
    held_out_II, _ = _advance(block, outputs, stream, stream.batches.held_out)
    orders = []
    for sub_block, linear, grid, gram_II in zip(sub_blocks, outputs, grids, fitted_II, strict=True):
        queries = any(width.queries < sub_block.heads_per_unit for width in grid)
        orders.append(order_units(sub_block, linear.weight_OI.float(), gram_II, queries=queries))
    return orders, held_out_II, energy


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


def _held_out_losses(
    order: UnitOrder, grid: Sequence[Width], fits: Mapping[Width, OutputFit]
) -> list[float]:
    """Held-out loss of each width of the grid, nothing for the last, which is all.

    It is measured at the widths that are fitted. Between them the loss on fitted tokens, which
    every width has, is scaled as it is at their ends.
    """
    fitted = [max(loss, sys.float_info.min) for loss in order.losses(grid[:-1])]
    measured = [place for place, width in enumerate(grid) if width in fits]
    factors = [fits[grid[place]].loss / fitted[place] for place in measured]
    scales = np.interp(range(len(fitted)), measured, factors).tolist()
    return [*(loss * scale for loss, scale in zip(fitted, scales, strict=True)), 0.0]


def _run_sub_models(
    block: nn.Module,
    orders: Sequence[UnitOrder],
    fits: Sequence[Mapping[Width, OutputFit]],
    widths: Sequence[tuple[Width, ...]],
    stream: Stream,
    states_NWLD: Tensor,
) -> None:
    """Carry every sub-model through the block; those of the same widths share their weights."""
    by_width = sorted(range(len(widths)), key=lambda number: widths[number])
    for wanted, members in groupby(by_width, key=lambda number: widths[number]):
        with ExitStack() as stack:
            for order, fitted, width in zip(orders, fits, wanted, strict=True):
                if width in fitted:
                    new = order.sub_block.stored_output(fitted[width].v_OK)
                    stack.enter_context(cut_to(block, order.sub_block, order.kept(width), new))
            for number in members:
                x_WLD = states_NWLD[number].to(stream.device, torch.float32)
                states_NWLD[number].copy_(stream.call(block, x_WLD))
