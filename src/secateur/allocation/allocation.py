"""What every allocation has in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from secateur.blocks.tasks import InputStatistics
from secateur.models.experts import linear_shapes
from secateur.models.structure import BlockList, Linear
from secateur.patterns.pattern import NM, Pattern
from secateur.patterns.plan import Plan, uniform_plan
from secateur.runs.errors import SecateurError
from secateur.runs.options import Options
from secateur.solvers.counts import (
    BINS,
    Histogram,
    bounded_counts,
    rank_histogram,
    score_histogram,
)
from secateur.solvers.scores import wanda_score


@dataclass(frozen=True)
class DenseBlock:
    """A block that is in memory now, and what the sequences say about it.

    Attributes:
        index: its number in the model.
        name: its full name.
        linears: in definition order.
        inputs: statistics of each linear's inputs, by name inside the block.
        sensitivity_O: root of the summed squared gradient of each output row, by name; only
            where a pass computes gradients.
    """

    index: int
    name: str
    linears: Sequence[Linear]
    inputs: Mapping[str, InputStatistics]
    sensitivity_O: Mapping[str, Tensor]

    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """Wanda scores, times row sensitivities if there are any; fp32 (out, in).

        Linears that no token reached have no score and are left out.

        Raises:
            SecateurError: a score is not finite.
        """
        for linear in self.linears:
            seen = self.inputs[linear.name]
            if seen.tokens == 0:
                continue
            score_OI = wanda_score(linear.weight_OI, seen.mean_square_I)
            if self.sensitivity_O:
                score_OI.mul_(self.sensitivity_O[linear.name][:, None])
            if not bool(torch.isfinite(score_OI.sum(dtype=torch.float64))):
                raise SecateurError(
                    f"The scores of {self.name}.{linear.name} contain NaN or infinite values; try "
                    "--dtype float32, and check that the model itself runs on this text."
                )
            yield linear.name, score_OI


class DensePasses(Protocol):
    """Passes over the dense model on calibration text, one block in memory at a time."""

    def blocks(self, sequences: int, probes: int = 0) -> Iterator[DenseBlock]: ...

    def blocks_under_loss(self, sequences: int) -> Iterator[DenseBlock]: ...


class Allocation(Options, ABC):
    """Options of a rule that divides the zeros among linears, and the rule itself."""

    measures: ClassVar[bool] = False

    def prepare(self, blocks: BlockList, pattern: Pattern) -> Plan:
        """Check all that can be checked before work starts.

        Returns:
            A plan with the right sizes and total, which ``allocate`` starts from.

        Raises:
            SecateurError: the budget or the pattern cannot be met.
        """
        return uniform_plan(linear_shapes(blocks), pattern)

    def passes(self, samples: int) -> float:
        """Work before pruning, in forward passes over this many sequences; backward is two."""
        return 0.0

    @abstractmethod
    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        """Return the plan with its zeros divided by this rule; their total stays the same.

        Args:
            plan: what ``prepare`` returned.
            blocks: the model's blocks.
            dense: the dense model on calibration text; given if the rule ``measures``.
        """


@dataclass(frozen=True)
class BlockCounts:
    """Full names, weights and zeros of the linears of one block in a plan."""

    names: list[str]
    weights: list[int]
    zeros: list[int]


def by_block(plan: Plan, blocks: BlockList) -> list[BlockCounts]:
    """Group a plan's linears by block, in the plan's order."""
    grouped = []
    for index in range(len(blocks)):
        names = [name for name in plan.weights if name.startswith(f"{blocks.name(index)}.")]
        grouped.append(
            BlockCounts(
                names, [plan.weights[name] for name in names], [plan.zeros[name] for name in names]
            )
        )
    return grouped


class Unequal(Allocation, ABC):
    """A rule that gives linears different sparsities."""

    max_sparsity: float = Field(0.95, gt=0, le=1, description="no linear loses a larger share")

    def prepare(self, blocks: BlockList, pattern: Pattern) -> Plan:
        plan = uniform_plan(linear_shapes(blocks), pattern)
        method = type(self).model_fields["method"].default
        if isinstance(pattern, NM):
            raise SecateurError(
                f"Pattern {pattern} fixes the sparsity of every linear, so the allocation {method} "
                "cannot divide it; choose a sparsity such as 0.5, or leave the allocation out."
            )
        if pattern.sparsity > self.max_sparsity:
            raise SecateurError(
                f"A sparsity of {pattern} cannot be reached while no linear may lose more than "
                f"{self.max_sparsity} of its weights; lower the sparsity, or raise max_sparsity "
                f"of the allocation {method} in the recipe."
            )
        return plan

    def most_zeros(self, block: BlockCounts) -> list[int]:
        """Most zeros that each linear may get; the uniform share, rounded, is always allowed."""
        return [
            max(math.floor(self.max_sparsity * weights), uniform)
            for weights, uniform in zip(block.weights, block.zeros, strict=True)
        ]


class PerBlock(Unequal, ABC):
    """A rule that gives each block a sparsity, which its linears share."""

    @abstractmethod
    def block_sparsities(self, target: float, count: int, dense: DensePasses | None) -> list[float]:
        """Return the sparsity wanted of each of ``count`` blocks; it may leave [0, 1]."""

    def allocate(self, plan: Plan, blocks: BlockList, dense: DensePasses | None) -> Plan:
        # A block whose linears are all left as they are takes no part.
        grouped = [block for block in by_block(plan, blocks) if block.names]
        sparsities = self.block_sparsities(plan.sparsity, len(grouped), dense)
        sizes = [size for block in grouped for size in block.weights]
        counts = bounded_counts(
            wanted=[
                sparsity * size
                for sparsity, block in zip(sparsities, grouped, strict=True)
                for size in block.weights
            ],
            sizes=sizes,
            total=sum(plan.zeros.values()),
            low=[0] * len(sizes),
            high=[most for block in grouped for most in self.most_zeros(block)],
        )
        names = [name for block in grouped for name in block.names]
        return replace(plan, zeros=dict(zip(names, counts, strict=True)))


@dataclass(frozen=True)
class ScoredBlock:
    """Score histograms of a block's linears, and the bounds of their zeros."""

    histograms_PB: Histogram
    low: list[int]
    high: list[int]


class ByThreshold(Unequal, ABC):
    """A rule that removes the weights whose scores lie under a common threshold."""

    measures: ClassVar[bool] = True

    scope: Literal["row", "linear"] = Field(
        "row",
        description="row: each row of a linear will lose the same share, as with Wanda; linear: "
        "the method divides a linear's zeros among its rows, as BESA and magnitude do",
    )

    @model_validator(mode="before")
    @classmethod
    def _rows_is_scope(cls, values: Any) -> Any:
        """Take the option by the name that it had, rows: even or free."""
        if isinstance(values, dict) and values.get("rows") in ("even", "free"):
            others = {key: value for key, value in values.items() if key != "rows"}
            return {"scope": "row" if values["rows"] == "even" else "linear", **others}
        return values

    def scored(self, block: DenseBlock, counts: BlockCounts) -> ScoredBlock:
        """Score a block; a linear that no token reached keeps its uniform share."""
        count = rank_histogram if self.scope == "row" else score_histogram
        scored = {name: count(score_OI) for name, score_OI in block.scores()}
        names = [linear.name for linear in block.linears]
        blind = [name not in scored for name in names]
        bounds = [
            (uniform, uniform) if fixed else (0, most)
            for uniform, most, fixed in zip(
                counts.zeros, self.most_zeros(counts), blind, strict=True
            )
        ]
        histograms = [scored.get(name, np.zeros(BINS, np.int32)) for name in names]
        return ScoredBlock(
            np.stack(histograms) if histograms else np.zeros((0, BINS), np.int32),
            [low for low, _ in bounds],
            [high for _, high in bounds],
        )


def opposed(target: float, values: Sequence[float], limit: float) -> list[float]:
    """Sparsities with the target as mean that fall as values rise, over a range of 2 limit."""
    least, most = min(values), max(values)
    if most == least:
        return [target] * len(values)
    scaled = [2 * limit * (value - least) / (most - least) for value in values]
    mean = sum(scaled) / len(scaled)
    return [target + mean - each for each in scaled]
