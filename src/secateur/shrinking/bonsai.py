"""Bonsai: structured pruning with forward passes alone, by regression on sub-models.

Dery et al. 2024, *Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes*,
arXiv 2402.05406. In each round the units with the lowest priors are candidates, sub-models lack
random halves of them, and the candidates that the utilities miss least go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.evaluation.scores import score_windows
from secateur.models.structure import BlockList
from secateur.runs.progress import Progress, silent
from secateur.shrinking.options import Prior
from secateur.shrinking.sub_models import narrowed
from secateur.shrinking.units import SubBlock
from secateur.solvers.scores import fluctuation_columns, unit_means, wanda_columns
from secateur.solvers.utility import fit_utilities


@dataclass(frozen=True)
class RoundOptions:
    """How a round looks for units: what names candidates, sub-models to try, the seed."""

    prior: Prior
    masks: int
    seed: int


@dataclass(frozen=True)
class Round:
    """What one round found and removed.

    Attributes:
        loss: mean loss in nats of the model that the round began with, on the round's windows.
        utilities: mean log-likelihood of each sub-model on them.
        removed: int64 indices of the units that went, for each sub-block.
        coefficients: mean coefficient per parameter of the units that went, for each sub-block;
            None where none did.
        tokens: that went through forward passes.
    """

    loss: float
    utilities: list[float]
    removed: list[Tensor]
    coefficients: list[float | None]
    tokens: int


@dataclass(frozen=True)
class Parent:
    """The resident dense model that all sub-models are parts of; ``dtype`` is of forward passes."""

    blocks: BlockList
    sub_blocks: Sequence[SubBlock]
    dtype: torch.dtype

    def loss(self, kept: Sequence[Tensor], windows_WL: Tensor) -> float:
        """Mean loss of the sub-model with the kept units, nats per token; may be NaN."""
        with narrowed(self.blocks, self.sub_blocks, kept):
            scores = score_windows(
                self.blocks.model, windows_WL, dtype=self.dtype, require_finite=False
            )
        return float(scores.loss_W.mean())

    def priors(
        self, kept: Sequence[Tensor], windows_WL: Tensor, prior: Prior, generator: torch.Generator
    ) -> tuple[float, list[Tensor]]:
        """Loss of a sub-model, and the prior of each of its units by sub-block."""
        with observed_moments(self.blocks, self.sub_blocks) as moments:
            loss = self.loss(kept, windows_WL)
        priors = []
        for sub_block, units, seen in zip(self.sub_blocks, kept, moments(), strict=True):
            weight_OI = output_weight(self.blocks, sub_block, units)
            columns = sub_block.columns_UP.shape[1]
            priors.append(score_units(prior, seen, weight_OI, columns, generator))
        return loss, priors


@torch.no_grad()
def prune_round(
    parent: Parent,
    kept: Sequence[Tensor],
    goal: Goal,
    share: float,
    windows_WL: Tensor,
    number: int,
    options: RoundOptions,
    progress: Progress = silent,
) -> Round:
    """Try sub-models of the model as it stands, and decide what it loses next.

    Each sub-model lacks about half of the candidates, in all sub-blocks at once; its utility is its
    mean log-likelihood on the windows of this round. Ridge regression of the utilities on the masks
    gives each candidate a coefficient, and the lowest per parameter go until ``share`` of the goal
    is reached. Rounds are numbered from 0.

    Raises:
        SecateurError: hardly any sub-model has a finite loss.
    """
    generator = torch.Generator().manual_seed((options.seed << 16) + number)
    units = [len(each) for each in kept]
    trials = goal.trials(share, units)
    loss, priors = parent.priors(kept, windows_WL, options.prior, generator)
    low = [lowest(prior_U, trial.candidates) for prior_U, trial in zip(priors, trials, strict=True)]
    weights = [sampling_weights(*each) for each in zip(priors, low, strict=True)]
    candidates = [left[positions] for left, positions in zip(kept, low, strict=True)]
    sizes = [len(each) for each in candidates]
    design_NM = draw_masks(weights, trials, options.masks, generator)
    utilities = []
    for done, mask_M in enumerate(design_NM):
        left_out = [
            each[~mask_C] for each, mask_C in zip(candidates, mask_M.split(sizes), strict=True)
        ]
        utilities.append(-parent.loss(remove(kept, left_out), windows_WL))
        progress(f"Round {number + 1}", done + 1, len(design_NM))
    fit = fit_utilities(design_NM.double(), torch.tensor(utilities, dtype=torch.float64))
    scores = fit.coefficients_M.split(sizes)
    gone = goal.choose(share, units, scores)
    return Round(
        loss=loss,
        utilities=utilities,
        removed=[each[positions] for each, positions in zip(candidates, gone, strict=True)],
        coefficients=[
            float(score_C[positions].mean()) / each.unit_parameters if len(positions) else None
            for each, score_C, positions in zip(parent.sub_blocks, scores, gone, strict=True)
        ],
        tokens=(1 + len(design_NM)) * windows_WL.numel(),
    )


def remove(kept: Sequence[Tensor], removed: Sequence[Tensor]) -> list[Tensor]:
    """Return the kept units without those that were removed, in their order."""
    return [left[~torch.isin(left, gone)] for left, gone in zip(kept, removed, strict=True)]


class Trial(NamedTuple):
    """How many units of a sub-block may go in a round, and how many of them a first mask lacks."""

    candidates: int
    drawn: int


@dataclass(frozen=True)
class Anywhere:
    """The goal to remove a number of parameters, wherever they do least harm.

    Attributes:
        budget: parameters to remove in all; never exceeded, and less than one unit is left of it.
        dense: units of each sub-block at the beginning.
        costs: parameters of one unit of each sub-block.
    """

    budget: int
    dense: Sequence[int]
    costs: Sequence[int]

    def trials(self, share: float, units: Sequence[int]) -> list[Trial]:
        """What a round tries of each sub-block.

        Args:
            share: of the goal that the round is to reach, 1 in the last one.
            units: that each sub-block has left.
        """
        present = sum(count * cost for count, cost in zip(units, self.costs, strict=True))
        quota = self._due(share, units) / present
        trials = []
        for count in units:
            candidates = count - math.floor(count * max(0.0, 1 - 2 * quota))
            trials.append(Trial(candidates, min(math.floor(quota * count) + 1, candidates)))
        return trials

    def choose(self, share: float, units: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        """Which candidates of each sub-block go, as positions among their scores, lowest first."""
        sizes = [len(score_C) for score_C in scores]
        cost_M = torch.tensor(self.costs).repeat_interleave(torch.tensor(sizes))
        gone_M = fill(torch.cat(list(scores)), cost_M, self._due(share, units))
        return [gone_C.nonzero().flatten() for gone_C in gone_M.split(sizes)]

    def reached(self, share: float, units: Sequence[int]) -> bool:
        """Whether nothing more has to go for this share."""
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
    """The goal to leave each sub-block ``final`` of its ``dense`` units; see ``Anywhere``."""

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


Goal = Anywhere | Exactly


def fill(score_M: Tensor, cost_M: Tensor, budget: int) -> Tensor:
    """Take units in rising order of score per cost as long as they fit; bool (units,).

    A unit that does not fit is passed over for cheaper ones behind it, so what is left of the
    budget is less than the cheapest unit not taken. Costs are int64.
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


class InputMoments(NamedTuple):
    """Means over tokens of what the columns of an output linear receive, fp32 (columns,)."""

    absolute_I: Tensor
    mean_I: Tensor
    square_I: Tensor


@contextmanager
def observed_moments(
    blocks: BlockList, sub_blocks: Sequence[SubBlock]
) -> Iterator[Callable[[], list[InputMoments]]]:
    """Within the context, forward passes are observed; the function gives each sub-block's moments.

    The columns are those that the output linears have during the passes.
    """
    tokens = [0] * len(sub_blocks)
    sums: dict[int, Tensor] = {}

    def adding(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_NI = inputs[0].detach().flatten(0, -2).float()
            with torch.autocast(x_NI.device.type, enabled=False):
                sums_MI = torch.stack([x_NI.abs().sum(0), x_NI.sum(0), x_NI.square().sum(0)])
            sums[place] = sums[place] + sums_MI if place in sums else sums_MI
            tokens[place] += len(x_NI)

        return add

    with ExitStack() as stack:
        for place, sub_block in enumerate(sub_blocks):
            output = blocks[sub_block.block].get_submodule(sub_block.output)
            stack.callback(output.register_forward_pre_hook(adding(place)).remove)
        yield lambda: [
            InputMoments(*(sums[place] / count).unbind()) for place, count in enumerate(tokens)
        ]


def output_weight(blocks: BlockList, sub_block: SubBlock, kept: Tensor) -> Tensor:
    """Columns of the output linear that belong to kept units, fp32 (out, columns)."""
    weight_OI = sub_block.output_linear(blocks[sub_block.block]).weight_OI
    return weight_OI[:, sub_block.columns_UP[kept].flatten().to(weight_OI.device)].float()


def score_units(
    prior: Prior, moments: InputMoments, w_OI: Tensor, unit: int, generator: torch.Generator
) -> Tensor:
    """Return one prior per unit, the mean over its ``unit`` columns; fp32 on the CPU (units,).

    ``magnitude`` is mean |x|, ``random`` is uniform in [0, 1); for the others see
    ``solvers.unit_scores``. A sub-block whose priors are not finite gets zeros: all its units are
    equally suspect.
    """
    if prior == "random":
        return torch.rand(w_OI.shape[1] // unit, generator=generator)
    if prior == "wanda":
        score_I = wanda_columns(w_OI, moments.square_I)
    elif prior == "magnitude":
        score_I = moments.absolute_I
    else:
        variance_I = (moments.square_I - moments.mean_I.square()).clamp_min(0)
        score_I = fluctuation_columns(w_OI, variance_I)
    score_U = unit_means(score_I, unit).cpu()
    return score_U if bool(score_U.isfinite().all()) else torch.zeros_like(score_U)


def lowest(prior_U: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest priors, the lowest first; ties go by position.

    What is drawn for a candidate then depends on its prior, not on where it lies.
    """
    return prior_U.argsort(stable=True)[:count]


def sampling_weights(prior_U: Tensor, candidates_C: Tensor) -> Tensor:
    """Weights in which candidates are left out: the best prior of the sub-block minus their own."""
    if len(candidates_C) == 0:
        return torch.empty(0)
    weight_C = prior_U.max() - prior_U[candidates_C]
    # Equal priors leave nothing to prefer, and every weight must be able to be drawn.
    return weight_C + torch.finfo(torch.float32).eps * weight_C.max() + 1e-30


def sample_without_replacement(
    weight_C: Tensor, count: int, draws: int, generator: torch.Generator
) -> Tensor:
    """Draw ``count`` of the candidates in each of ``draws`` draws; bool (draws, candidates).

    The ``count`` smallest of exponential variables with the weights as rates are a weighted sample
    without replacement: Efraimidis and Spirakis, *Weighted random sampling with a reservoir*, 2006.
    """
    uniform_DC = torch.rand(draws, len(weight_C), generator=generator, dtype=torch.float64)
    key_DC = -torch.log1p(-uniform_DC) / weight_C.double()
    chosen_DC = torch.zeros(draws, len(weight_C), dtype=torch.bool)
    return chosen_DC.scatter_(1, key_DC.topk(count, dim=1, largest=False).indices, True)


def draw_masks(
    weights: Sequence[Tensor], trials: Sequence[Trial], masks: int, generator: torch.Generator
) -> Tensor:
    """Draw the sub-models of a round; bool (masks, candidates of all sub-blocks), True = kept.

    Every second mask keeps the candidates that the one before it left out; of an odd number the
    last has no complement. All sub-blocks are masked at once, and for each of them it is drawn
    which of a pair lacks its drawn candidates: otherwise single candidates of several sub-blocks
    would always go together, and no utility could tell them apart. ``weights`` say for each
    sub-block how readily its candidates are left out.
    """
    pairs = -(-masks // 2)
    left_out_PM = torch.cat(
        [
            sample_without_replacement(weight_C, trial.drawn, pairs, generator)
            ^ (torch.rand(pairs, 1, generator=generator) < 0.5)
            for weight_C, trial in zip(weights, trials, strict=True)
        ],
        dim=1,
    )
    return torch.stack([~left_out_PM, left_out_PM], dim=1).flatten(0, 1)[:masks]
