"""What is done to a block before any of its weights is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.models.structure import Linear
from secateur.patterns.pattern import Pattern


@dataclass
class DenseTask:
    """A dense block and what is known of it.

    Attributes:
        block: the module itself, fp32.
        groups: its prunable linears by shared input, in the order of execution.
        pattern: what masks will look like.
        mean_squares: mean squared inputs of the linears by column, by name.
        run: runs the block in fp32 on a window of calibration text and returns its output.
        generator: for every random choice.
        notes: sentences for the report.
    """

    block: nn.Module
    groups: Sequence[Sequence[Linear]]
    pattern: Pattern
    mean_squares: dict[str, Tensor]
    run: Callable[[], Tensor]
    generator: torch.Generator
    notes: list[str] = field(default_factory=list)
