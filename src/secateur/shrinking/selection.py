"""How much a round may remove, and which units of those that were tried it removes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.shrinking.sampling import Trial


class Goal(Protocol):
    """Where the rounds lead."""

    def trials(self, share: float, units: Sequence[int]) -> list[Trial]:
        """What to try, once ``share`` of all that is to go should be gone.

        Args:
            share: of the goal that this round reaches, 1 in the last.
            units: that each sub-block has left.
        """

    def choose(self, share: float, units: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        """Return for each sub-block which of its candidates go, as positions among them.

        Args:
            share: as for ``trials``.
            units: as for ``trials``.
            scores: utility of the candidates of each sub-block; the lowest go first.
        """

    def reached(self, share: float, units: Sequence[int]) -> bool:
        """Whether no unit more is to be removed until ``share`` of the goal is reached."""


@dataclass(frozen=True)
class Anywhere:
    """A number of parameters, wherever they do least harm.

    Attributes:
        budget: parameters to remove in all; never exceeded, and less than one unit is left of it.
        dense: units of each sub-block at the beginning.
        costs: parameters of one unit of each sub-block.
    """

    budget: int
    dense: Sequence[int]
    costs: Sequence[int]

    def trials(self, share: float, units: Sequence[int]) -> list[Trial]:
        present = sum(count * cost for count, cost in zip(units, self.costs, strict=True))
        quota = self._due(share, units) / present
        trials = []
        for count in units:
            candidates = count - math.floor(count * max(0.0, 1 - 2 * quota))
            trials.append(Trial(candidates, min(math.floor(quota * count) + 1, candidates)))
        return trials

    def choose(self, share: float, units: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        sizes = [len(score_C) for score_C in scores]
        cost_M = torch.tensor(self.costs).repeat_interleave(torch.tensor(sizes))
        gone_M = fill(torch.cat(list(scores)), cost_M, self._due(share, units))
        return [gone_C.nonzero().flatten() for gone_C in gone_M.split(sizes)]

    def reached(self, share: float, units: Sequence[int]) -> bool:
        present = [cost for count, cost in zip(units, self.costs, strict=True) if count]
        return self._due(share, units) < min(present, default=math.inf)

    def _due(self, share: float, units: Sequence[int]) -> int:
        gone = sum(
            (before - now) * cost
            for before, now, cost in zip(self.dense, units, self.costs, strict=True)
        )
        return math.floor(self.budget * share) - gone


@dataclass(frozen=True)
class Exactly:
    """A number of units for each sub-block.

    Attributes:
        final: units that each sub-block keeps.
        dense: units of each sub-block at the beginning.
    """

    final: Sequence[int]
    dense: Sequence[int]

    def trials(self, share: float, units: Sequence[int]) -> list[Trial]:
        return [
            Trial(min(2 * due, count), due)
            for due, count in zip(self._due(share, units), units, strict=True)
        ]

    def choose(self, share: float, units: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        return [
            score_C.argsort(stable=True)[:due]
            for due, score_C in zip(self._due(share, units), scores, strict=True)
        ]

    def reached(self, share: float, units: Sequence[int]) -> bool:
        return not any(self._due(share, units))

    def _due(self, share: float, units: Sequence[int]) -> list[int]:
        return [
            count - before + math.floor((before - last) * share)
            for count, before, last in zip(units, self.dense, self.final, strict=True)
        ]


def fill(score_M: Tensor, cost_M: Tensor, budget: int) -> Tensor:
    """Take units in rising order of score per cost as long as they fit; bool (units,).

    A unit that does not fit is passed over for cheaper ones behind it, so what is left of the
    budget is less than the cheapest unit not taken.

    Args:
        score_M: what removing a unit costs in utility.
        cost_M: int64, what it frees.
        budget: what may be freed in all.
    """
    taken_M = torch.zeros(len(score_M), dtype=torch.bool)
    costs = cost_M.tolist()
    cheapest = min(costs, default=0)
    for unit in (score_M / cost_M).argsort(stable=True).tolist():
        if budget < cheapest:
            break
        if costs[unit] <= budget:
            budget -= costs[unit]
            taken_M[unit] = True
    return taken_M
