"""Let rows with dear marginal weights keep more of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

# Weights whose cost is within this factor of the threshold stand for the margin of their row.
_MARGIN = 1.5

# One weight in so many says where a threshold lies.
_SAMPLED = 13


def margin_threshold(costs: Collection[Tensor], share: float) -> float:
    """About the cost of the dearest weight if the cheapest share of all is removed; positive."""
    sample_N = torch.cat([cost.flatten()[::_SAMPLED] for cost in costs])
    rank = min(max(1, round(share * len(sample_N))), len(sample_N))
    return max(float(sample_N.kthvalue(rank).values), torch.finfo(torch.float32).tiny)


def follow_margin(cost_OI: Tensor, slope_OI: Tensor, threshold: float, pull: float) -> None:
    """Scale each row's costs by the loss's slope at the row's margin, in place.

    At the best rates the last weight removed from every row costs the same. ``cost_OI`` foretells
    that cost, T at the threshold; at the present mask the loss also has a first-order slope −W·G,
    the change on removing a kept weight, and minus the change on bringing a removed one back, so
    that both sides of the margin say the same. With s the mean slope over a row's margin, the row's
    costs are multiplied by exp(pull · clip(s / T, −1, 1)).

    Args:
        cost_OI: Expected rise of the loss on removing each weight; weights below the threshold are
            removed.
        slope_OI: −W·G, G the gradient of the loss at the masked weights.
        threshold: T, positive.
        pull: Step size.
    """
    margin_OI = (cost_OI > threshold / _MARGIN) & (cost_OI < threshold * _MARGIN)
    slope_O = slope_OI.mul(margin_OI).sum(1) / margin_OI.sum(1).clamp_min(1)
    cost_OI.mul_((slope_O / threshold).clamp_(-1, 1).mul_(pull).exp_()[:, None])
