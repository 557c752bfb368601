"""What pruning a block leaves behind, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.solvers.grids import Clipping
from secateur.solvers.quantise import QuantisedSolution


@dataclass
class PrunedBlock:
    """What happened to a block.

    Attributes:
        masks: by linear name inside the block; bool, True = kept.
        quantised: weights as levels of a grid, by linear name.
        clippings: learned ranges of the grids to come, by linear name.
        rounded_to_zero: kept weights whose value on the grid is zero, by linear name.
        errors: relative squared output error of each linear on held-out tokens.
        notes: fallbacks used and updates rejected, as sentences.
        seconds: time by phase.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    quantised: dict[str, QuantisedSolution] = field(default_factory=dict)
    clippings: dict[str, Clipping] = field(default_factory=dict)
    rounded_to_zero: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Adds up wall time by phase, waiting for the device where there is one."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under ``phase``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
