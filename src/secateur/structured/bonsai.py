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
from transformers import PreTrainedModel

from secateur.architecture import BlockList
from secateur.evaluation.scores import score_windows
from secateur.progress import Progress, silent
from secateur.solvers.utility import fit_utilities
from secateur.structured.masking import narrowed
from secateur.structured.priors import Prior, observed_moments, output_weight, score_units
from secateur.structured.sampling import draw_masks, lowest, sampling_weights
from secateur.structured.selection import Goal
from secateur.structured.units import SubBlock


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


def round_shares(sparsity: float, step: float) -> list[float]:
    """Share of the goal that is reached after each round, when one removes at most ``step``."""
    rounds = max(1, math.ceil(sparsity / step - 1e-9))
    return [min(1.0, (number + 1) * step / sparsity) for number in range(rounds - 1)] + [1.0]


@torch.no_grad()
def prune_round(
    blocks: BlockList,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    goal: Goal,
    share: float,
    windows_WL: Tensor,
    dtype: torch.dtype,
    number: int,
    options: RoundOptions,
    progress: Progress = silent,
) -> Round:
    """Try sub-models of the model as it stands, and decide what it loses next.

    The units with the lowest priors are candidates. Each sub-model lacks about half of them, in
    all sub-blocks at once; its utility is its mean log-likelihood. Ridge regression of the
    utilities on the masks gives each candidate a coefficient, and the lowest per parameter go.

    Args:
        blocks: the model with its dense weights.
        sub_blocks: its sub-blocks.
        kept: units that are left of each.
        goal: how much goes, and which of the candidates.
        share: of the goal to be reached.
        windows_WL: int64 (windows, length), the text of this round.
        dtype: of forward passes.
        number: of the round, from 0.
        options: how to look.
        progress: told how many sub-models were tried.
    """
    generator = torch.Generator().manual_seed((options.seed << 16) + number)
    units = [len(each) for each in kept]
    with narrowed(blocks, sub_blocks, kept), observed_moments(blocks, sub_blocks) as moments:
        loss = _mean_loss(blocks.model, windows_WL, dtype)
        observed = moments()
    priors = [
        score_units(options.prior, seen, output_weight(blocks, each, left), generator)
        for each, left, seen in zip(sub_blocks, kept, observed, strict=True)
    ]
    trials = goal.trials(share, units)
    candidates = [
        lowest(prior_U, trial.candidates) for prior_U, trial in zip(priors, trials, strict=True)
    ]
    weights = [
        sampling_weights(prior_U, chosen)
        for prior_U, chosen in zip(priors, candidates, strict=True)
    ]
    design_NM = draw_masks(weights, trials, options.masks, generator)
    sizes = [len(chosen) for chosen in candidates]
    utilities = []
    for done, mask_M in enumerate(design_NM):
        parts = mask_M.split(sizes)
        sub_model = [
            _without(left, chosen[~mask_C])
            for left, chosen, mask_C in zip(kept, candidates, parts, strict=True)
        ]
        with narrowed(blocks, sub_blocks, sub_model):
            utilities.append(-_mean_loss(blocks.model, windows_WL, dtype))
        progress(f"Round {number + 1}", done + 1, len(design_NM))
    fit = fit_utilities(design_NM.double(), torch.tensor(utilities, dtype=torch.float64))
    scores = fit.coefficients_M.split(sizes)
    gone = goal.choose(share, units, scores)
    return Round(
        loss=loss,
        utilities=utilities,
        removed=[
            left[chosen[positions]]
            for left, chosen, positions in zip(kept, candidates, gone, strict=True)
        ],
        coefficients=[
            float(score_C[positions].mean()) / each.unit_parameters if len(positions) else None
            for each, score_C, positions in zip(sub_blocks, scores, gone, strict=True)
        ],
        tokens=(1 + len(design_NM)) * windows_WL.numel(),
    )


def remove(kept: Sequence[Tensor], removed: Sequence[Tensor]) -> list[Tensor]:
    """Return the kept units without those that were removed, in rising order."""
    return [left[~torch.isin(left, gone)] for left, gone in zip(kept, removed, strict=True)]


def _without(left: Tensor, positions: Tensor) -> Tensor:
    stays = torch.ones(len(left), dtype=torch.bool)
    stays[positions] = False
    return left[stays]


def _mean_loss(model: PreTrainedModel, windows_WL: Tensor, dtype: torch.dtype) -> float:
    scores = score_windows(model, windows_WL, dtype=dtype, require_finite=False)
    return float(scores.loss_W.mean())
