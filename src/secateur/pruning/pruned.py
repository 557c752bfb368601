"""A block while it is pruned, and what that leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isnan, nan
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.blocks.replay import Replay
from secateur.blocks.streams import Stream
from secateur.models.structure import Linear
from secateur.report.documents.prune import BlockReport, LeftLinear, LinearReport
from secateur.solvers.grids import Clipping, QuantizedSolution


class Zeros(NamedTuple):
    """Zeros of a linear, and all its weights."""

    zeros: int
    weights: int


@dataclass
class PrunedBlock:
    """What happened to a block.

    Attributes:
        index: its number in the model.
        held_out_error: of its output against that of the dense block on the same held-out hidden
            states (``state_error``), mean over tokens.
        masks: by linear name inside the block; bool, True = kept.
        quantised: weights as levels of a grid, by linear name.
        clippings: learned ranges of the grids to come, by linear name.
        rounded_to_zero: kept weights whose value on the grid is zero, by linear name.
        errors: relative squared output error of each linear on held-out tokens.
        zeros_before: zeros that each of its linears had before, by name; those that are left as
            they are too.
        notes: fallbacks used and updates rejected, as sentences.
        rejected: updates that held-out text refused, by stage.
        seconds: time by phase.
    """

    index: int
    held_out_error: float = nan
    masks: dict[str, Tensor] = field(default_factory=dict)
    quantised: dict[str, QuantizedSolution] = field(default_factory=dict)
    clippings: dict[str, Clipping] = field(default_factory=dict)
    rounded_to_zero: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    zeros_before: dict[str, Zeros] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class OpenBlock:
    """A block while it is pruned.

    Attributes:
        name: full name of the block, for messages.
        block: the module, with fp32 weights that stages replace.
        linears: its prunable linears.
        stream: hidden states that enter it in the model pruned so far.
        zeros: exact number of zeros of each linear, by name inside the block.
        stored: dtype that weights are saved in; new weights are rounded to it at once, so that
            what follows sees the weights of the file.
        replay: remembers the parts of the block that are finished.
        pruned: what happened to it so far; its masks are those to go on with.
        dense: original weights by linear name; None while the block holds them and no stage asks.
    """

    name: str
    block: nn.Module
    linears: tuple[Linear, ...]
    stream: Stream
    zeros: Mapping[str, int]
    stored: torch.dtype
    replay: Replay
    pruned: PrunedBlock
    dense: Mapping[str, Tensor] | None = None


def zeros_of(linears: Iterable[Linear]) -> dict[str, Zeros]:
    """Count the zeros of linears, by name."""
    return {
        linear.name: Zeros(int((linear.weight_OI == 0).sum()), linear.weight_OI.numel())
        for linear in linears
    }


def describe_block(pruned: PrunedBlock) -> BlockReport:
    """Put a pruned block into the report's terms."""
    return BlockReport(
        index=pruned.index,
        held_out_error=pruned.held_out_error,
        linears={
            name: LinearReport(
                zeros=(zeros := mask_OI.numel() - int(mask_OI.sum())),
                zeros_before=pruned.zeros_before[name].zeros if name in pruned.zeros_before else 0,
                rounded_to_zero=pruned.rounded_to_zero.get(name, 0),
                weights=mask_OI.numel(),
                sparsity=zeros / mask_OI.numel(),
                rows=_row_classes(mask_OI),
                relative_error=None if isnan(pruned.errors[name]) else pruned.errors[name],
            )
            for name, mask_OI in pruned.masks.items()
        },
        left={
            name: LeftLinear(zeros=each.zeros, weights=each.weights)
            for name, each in pruned.zeros_before.items()
            if name not in pruned.masks
        },
        notes=pruned.notes,
        rejected=dict(pruned.rejected),
        seconds={phase: round(value, 3) for phase, value in pruned.seconds.items()},
    )


def _row_classes(mask_OI: Tensor) -> list[int]:
    sparsity_O = 1 - mask_OI.sum(1) / mask_OI.shape[1]
    classes: list[int] = (sparsity_O * 10).long().clamp_(0, 9).bincount(minlength=10).tolist()
    return classes
