"""Structured pruning with forward passes alone: rounds of sub-models and a regression on them.

The method of *Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes*,
arXiv 2402.05406.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.evaluation.scores import score_windows
from secateur.models.structure import BlockList
from secateur.runs.progress import Progress, silent
from secateur.shrinking.masking import narrowed
from secateur.shrinking.priors import Prior, observed_moments, output_weight, score_units
from secateur.shrinking.sampling import draw_masks, lowest, sampling_weights
from secateur.shrinking.selection import Goal
from secateur.shrinking.units import SubBlock
from secateur.solvers.utility import fit_utilities


@dataclass(frozen=True)
class Parent:
    """The resident model that all sub-models are parts of.

    Attributes:
        blocks: the model with its dense weights.
        sub_blocks: its sub-blocks.
        dtype: of forward passes.
    """

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
        priors = [
            score_units(
                prior,
                seen,
                output_weight(self.blocks, sub_block, units),
                sub_block.columns_UP.shape[1],
                generator,
            )
            for sub_block, units, seen in zip(self.sub_blocks, kept, moments(), strict=True)
        ]
        return loss, priors


@dataclass(frozen=True)
class RoundOptions:
    """How a round looks for units to remove.

    Attributes:
        prior: what decides which units are candidates.
        masks: how many sub-models are tried.
        seed: of the run; every round draws from it anew.
    """

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


def round_shares(sparsity: float, step: float) -> list[float]:
    """Share of the goal that is reached after each round, when one removes at most ``step``."""
    rounds = max(1, math.ceil(sparsity / step - 1e-9))
    return [min(1.0, (number + 1) * step / sparsity) for number in range(rounds - 1)] + [1.0]


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

    The units with the lowest priors are candidates. Each sub-model lacks about half of them, in
    all sub-blocks at once; its utility is its mean log-likelihood. Ridge regression of the
    utilities on the masks gives each candidate a coefficient, and the lowest per parameter go.

    Args:
        parent: the model.
        kept: units that are left of each sub-block.
        goal: how much goes, and which of the candidates.
        share: of the goal to be reached.
        windows_WL: int64 (windows, length), the text of this round.
        number: of the round, from 0.
        options: how to look.
        progress: told how many sub-models were tried.

    Raises:
        SecateurError: hardly any sub-model has a finite loss.
    """
    generator = torch.Generator().manual_seed((options.seed << 16) + number)
    units = [len(each) for each in kept]
    trials = goal.trials(share, units)
    loss, priors = parent.priors(kept, windows_WL, options.prior, generator)
    chosen = [
        lowest(prior_U, trial.candidates) for prior_U, trial in zip(priors, trials, strict=True)
    ]
    weights = [
        sampling_weights(prior_U, positions)
        for prior_U, positions in zip(priors, chosen, strict=True)
    ]
    candidates = [left[positions] for left, positions in zip(kept, chosen, strict=True)]
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
