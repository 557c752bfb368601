"""Which sub-models are tried: pinned units, candidates, and masks in complementary pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trial:
    """What one round does with a sub-block.

    Attributes:
        candidates: how many of its units may go; all others are pinned.
        drawn: how many of them the first mask of a pair leaves out.
    """

    candidates: int
    drawn: int


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

    Every second mask is the complement of the one before it among the candidates of each sub-block:
    it keeps what that left out. All sub-blocks are masked at once, and which of the pair has the
    drawn ones left out is drawn for each by itself: where a sub-block has a single candidate, all
    of those would otherwise go and stay together, and no utility could tell them apart.

    Args:
        weights: of the candidates of each sub-block, how readily they are left out.
        trials: how many of them a mask leaves out.
        masks: how many sub-models; of an odd number the last has no complement.
        generator: of the random choices.
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
