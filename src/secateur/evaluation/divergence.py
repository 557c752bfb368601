"""Predictions, and how far those of a pruned model have moved from those of the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Next tokens as a model sees them, without a table of their log-probabilities.

    Over a vocabulary such a table costs more to fill than the matrix product that logits come from.

    Attributes:
        logits_PV: fp32 (positions, vocabulary).
    """

    logits_PV: Tensor

    @cached_property
    def total_P(self) -> Tensor:
        """Logarithm of what softmax divides by, (positions,)."""
        return self.logits_PV.logsumexp(-1)

    @cached_property
    def probability_PV(self) -> Tensor:
        """Of each token, (positions, vocabulary)."""
        return self.logits_PV.sub(self.total_P[:, None]).exp_()

    def loss(self, targets_P: Tensor) -> Tensor:
        """Negative log-probability of one token for each position, nats (positions,)."""
        return self.total_P - self.logits_PV.gather(1, targets_P[:, None]).squeeze(1)

    def divergence(self, other: Predictions) -> Tensor:
        """KL(these ‖ the other's) in nats for each position, (positions,); 0 for the same ones."""
        # The difference first: sums of large logits would leave their rounding behind.
        distance_PV = self.logits_PV - other.logits_PV
        moved_P: Tensor = torch.linalg.vecdot(self.probability_PV, distance_PV)
        return moved_P + (other.total_P - self.total_P)

    def agreement(self, other: Predictions) -> Tensor:
        """1 where both find the same token likeliest, 0 elsewhere: fp32 (positions,)."""
        return (self.logits_PV.argmax(-1) == other.logits_PV.argmax(-1)).float()


def kl_divergence(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) in nats at each position, fp32 (positions,).

    Args:
        dense_PV: log-probabilities (positions, vocabulary) of the dense model.
        pruned_PV: those of the pruned model.
    """
    return (dense_PV.exp() * (dense_PV - pruned_PV)).sum(-1)
