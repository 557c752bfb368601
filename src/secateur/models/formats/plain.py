"""Weights under their own names, as numbers of the checkpoint's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from secateur.models.formats.format import WEIGHT, FinishedLinear, Stored, WeightFormat
from secateur.models.structure import BlockList
from secateur.patterns.pattern import Pattern


class Plain(WeightFormat):
    """What every program reads; removed weights are zeros like any other number."""

    name = "plain"

    @classmethod
    def recognise(cls, described: Mapping[str, Any]) -> Self | None:
        return None if described else cls()

    def describe(self, blocks: BlockList) -> dict[str, Any]:
        return {}

    def layout(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, Stored]:
        return {WEIGHT: Stored(shape, dtype)}

    def encode(self, linear: FinishedLinear) -> dict[str, Tensor]:
        return {WEIGHT: linear.weight_OI.to(linear.dtype)}

    def decode(self, pieces: Mapping[str, Tensor]) -> Tensor:
        return pieces[WEIGHT]

    def weight(self, stored: Mapping[str, Stored], read: Callable[[str], Tensor]) -> Stored:
        return stored[WEIGHT]

    def check(self, blocks: BlockList, pattern: Pattern, whole: str | None = None) -> None:
        """Every model has a place."""
