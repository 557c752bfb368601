"""How far a pruned model's predictions have moved from the dense model's."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) in nats at each position, fp32 (positions,).

    Args:
        dense_PV: log-probabilities (positions, vocabulary) of the dense model.
        pruned_PV: those of the pruned model.
    """
    return (dense_PV.exp() * (dense_PV - pruned_PV)).sum(-1)


def top1_agreement(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """1 where both models find the same token likeliest, 0 elsewhere: fp32 (positions,)."""
    return (dense_PV.argmax(-1) == pruned_PV.argmax(-1)).float()
