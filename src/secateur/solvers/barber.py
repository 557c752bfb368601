"""LLM-Barber: exchange badly chosen weights by their scores (Su et al. 2024, arXiv 2408.10631).

Given a mask, a pair is one removed and one kept weight of the same unit whose scores stand in the
wrong order. The released code exchanges pairs by comparing scores with two thresholds, so that
ties change the number of zeros; here they are exchanged by position, as many one way as the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.patterns.pattern import NM, Pattern, Scope, lowest
from secateur.solvers.gram import check_finite


def barber_score(value_OI: Tensor, mean_square_OI: Tensor) -> Tensor:
    """|W| times the root mean square of its gradient over calibration sequences.

    Args:
        value_OI: What each weight is if it is kept.
        mean_square_OI: Mean over sequences of the squared gradient of each sequence's error.
    """
    return value_OI.abs().mul_(mean_square_OI.sqrt())


def rebuild_masks(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    pattern: Pattern,
    scope: Scope,
    ratio: float,
) -> list[Tensor]:
    """Exchange a share of the pairs whose order is wrong; no unit, or group, changes its zeros.

    In each unit let g be the scores of removed weights in descending order and p those of kept
    weights in ascending order. The pairs are those i with g_i > p_i; the first ⌊ratio · pairs⌋ of
    them are exchanged. With ratio 1 the unit keeps its highest scores, and the pairs of a smaller
    ratio are among those of a larger one. Of equal scores the earlier is exchanged first.

    Under n:m pairs form within groups, and of all pairs of a row those of the largest gain
    g_i − p_i come first.

    Args:
        scores: Of the linears of one part of a block, each (out, in).
        masks: In the same order.
        pattern: Which the masks have.
        scope: The unit: the whole part of the block, a linear, an output row or an input column.
            n:m does not use it.
        ratio: Share of the pairs, in [0, 1].
    """
    for score_OI in scores:
        check_finite("the scores that masks are rebuilt by", score_OI)
    if isinstance(pattern, NM):
        return [
            _exchange_in_groups(score_OI, mask_OI, pattern.m, ratio)
            for score_OI, mask_OI in zip(scores, masks, strict=True)
        ]
    if scope == "block":
        score_1N, mask_1N = (
            torch.cat([each.flatten() for each in t])[None] for t in (scores, masks)
        )
        parts = _exchange(score_1N, mask_1N, ratio)[0].split([mask.numel() for mask in masks])
        return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]
    rebuilt = []
    for score_OI, mask_OI in zip(scores, masks, strict=True):
        if scope == "column":
            rebuilt.append(_exchange(score_OI.T.contiguous(), mask_OI.T, ratio).T.contiguous())
        elif scope == "row":
            rebuilt.append(_exchange(score_OI, mask_OI, ratio))
        else:
            flat_1N = _exchange(score_OI.reshape(1, -1), mask_OI.reshape(1, -1), ratio)
            rebuilt.append(flat_1N.view(mask_OI.shape))
    return rebuilt


def _exchange(score_UN: Tensor, mask_UN: Tensor, ratio: float) -> Tensor:
    """Exchange pairs within each row of a matrix whose rows are units."""
    counts = _share(_pairs(score_UN, mask_UN), ratio)
    restored_UN = lowest(score_UN.neg().masked_fill_(mask_UN, torch.inf), counts)
    removed_UN = lowest(score_UN.masked_fill(~mask_UN, torch.inf), counts)
    return mask_UN ^ restored_UN ^ removed_UN


def _pairs(score_UN: Tensor, mask_UN: Tensor) -> Tensor:
    """How many pairs of each unit are in the wrong order, without sorting them.

    With K kept weights and t the K-th highest score of the unit, they are the removed weights
    above t or the kept ones below it, whichever are more.
    """
    low_UN = lowest(score_UN, (~mask_UN).sum(1).tolist())
    limit_U1 = score_UN.masked_fill(low_UN, torch.inf).amin(1, keepdim=True)
    above_U = ((score_UN > limit_U1) & ~mask_UN).sum(1)
    below_U = ((score_UN < limit_U1) & mask_UN).sum(1)
    return torch.maximum(above_U, below_U)


def _exchange_in_groups(score_OI: Tensor, mask_OI: Tensor, m: int, ratio: float) -> Tensor:
    """Exchange pairs within groups of m columns, by gain over each row."""
    score_OGM, mask_OGM = score_OI.unflatten(1, (-1, m)), mask_OI.unflatten(1, (-1, m))
    best_OGM, restored_OGM = score_OGM.masked_fill(mask_OGM, -torch.inf).sort(
        dim=2, descending=True, stable=True
    )
    worst_OGM, removed_OGM = score_OGM.masked_fill(~mask_OGM, torch.inf).sort(dim=2, stable=True)
    # Where a group has run out of one kind, the gain is −inf.
    gain_OGM = best_OGM.sub_(worst_OGM)
    counts = _share((gain_OGM > 0).sum((1, 2)), ratio)
    chosen_OGM = lowest(gain_OGM.neg_().flatten(1), counts).view(gain_OGM.shape)
    nothing_OGM = torch.zeros_like(mask_OGM)
    back_OGM = nothing_OGM.scatter(2, restored_OGM, chosen_OGM)
    gone_OGM = nothing_OGM.scatter(2, removed_OGM, chosen_OGM)
    rebuilt_OI: Tensor = (mask_OGM ^ back_OGM ^ gone_OGM).flatten(1)
    return rebuilt_OI


def _share(pairs_U: Tensor, ratio: float) -> list[int]:
    counts: list[int] = (pairs_U.double() * ratio).long().tolist()
    return counts
