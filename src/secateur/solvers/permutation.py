"""An order of columns in which large scores do not compete in one group of n:m."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.patterns.pattern import NM, keep_highest

# Rows that guide the search. Its gain is counted on all rows.
_ROWS = 2048
# Groups that exchange columns with each other: work grows with the width, not with its square.
_PARTNERS = 128
# A sweep that saves a smaller share of what the pattern removes is the last one.
_LEAST_GAIN = 2e-3
_MOST_SWEEPS = 30
# Gains below this share of the largest are rounding.
_NOISE = 1e-6


@dataclass(frozen=True)
class Order:
    """An order of columns and what it is good for.

    Attributes:
        order_BC: Position c of problem b takes column order_BC[b, c].
        kept_before: Share of all scores that the pattern keeps in the given order.
        kept: The same in this order; never less.
    """

    order_BC: Tensor
    kept_before: float
    kept: float


def kept_score(score_BRC: Tensor, pattern: NM) -> Tensor:
    """Sum of the scores that n:m keeps, for each problem of rows by columns; float64 (B,)."""
    kept_B = torch.zeros(len(score_BRC), dtype=torch.float64, device=score_BRC.device)
    for part_BRC in score_BRC.split(_ROWS, dim=1):
        part_BRGM = part_BRC.unflatten(2, (-1, pattern.m))
        removed_BRGM = ~keep_highest(part_BRGM, pattern.n, dim=3)
        kept_B += part_BRGM.masked_fill(removed_BRGM, 0).sum((1, 2, 3), dtype=torch.float64)
    return kept_B


def best_order(score_BRC: Tensor, pattern: NM, generator: torch.Generator) -> Order:
    """Find an order of the columns under which n:m keeps more of the score.

    The start is the better of the given order and of columns sorted by their total and dealt out
    over the groups. Then one column is taken out of every group, and groups swap them as long as
    two of them gain by it; this repeats with other columns.
    The scheme is that of Zhang et al. 2024 (Plug-and-Play, doi 10.20944/preprints202310.1487), who
    solve the assignment of columns to groups exactly where this swaps pairs.

    Args:
        score_BRC: Scores of independent problems, not negative: rows by columns, whose number
            m divides.
        pattern: n of every m consecutive columns are kept, those with the highest scores.
        generator: Of the CPU; decides which columns are taken out together.

    Returns:
        The order found for each problem; the given one where none is better.
    """
    guide_BRC = score_BRC[:, :: -(-score_BRC.shape[1] // _ROWS)]
    identity_BC = torch.arange(score_BRC.shape[2], device=score_BRC.device)
    identity_BC = identity_BC.expand(len(score_BRC), -1)
    dealt_BC = _dealt(guide_BRC, pattern)
    order_BC, _, kept_B = _better(guide_BRC, pattern, dealt_BC, identity_BC)
    # Where everything is kept, there is nothing to gain.
    sweeps = 0 if pattern.n == pattern.m else _MOST_SWEEPS
    total = guide_BRC.sum(dtype=torch.float64)
    for _ in range(sweeps):
        removed = total - kept_B.sum()
        order_BC = _sweep(guide_BRC, order_BC, pattern, generator)
        kept_B = kept_score(_ordered(guide_BRC, order_BC), pattern)
        if removed - (total - kept_B.sum()) <= _LEAST_GAIN * removed:
            break
    order_BC, before_B, kept_B = _better(score_BRC, pattern, order_BC, identity_BC)
    total = score_BRC.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    return Order(order_BC, float(before_B.sum() / total), float(kept_B.sum() / total))


def _better(
    score_BRC: Tensor, pattern: NM, order_BC: Tensor, identity_BC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the order for each problem where it keeps more than the identity.

    Returns:
        what was taken (B, C), what the identity keeps (B,), what the taken order keeps (B,).
    """
    before_B = kept_score(score_BRC, pattern)
    kept_B = kept_score(_ordered(score_BRC, order_BC), pattern)
    taken_BC = order_BC.where((kept_B > before_B)[:, None], identity_BC)
    return taken_BC, before_B, kept_B.maximum(before_B)


def _ordered(score_BRC: Tensor, order_BC: Tensor) -> Tensor:
    return score_BRC.gather(2, order_BC[:, None].expand(-1, score_BRC.shape[1], -1))


def _dealt(score_BRC: Tensor, pattern: NM) -> Tensor:
    """Columns by falling total, dealt to the groups one by one, to and fro; (B, C)."""
    ranked_BC = score_BRC.sum(1).argsort(stable=True, dim=1, descending=True)
    ranked_BMG = ranked_BC.view(len(ranked_BC), pattern.m, -1)
    ranked_BMG[:, 1::2] = ranked_BMG[:, 1::2].flip(2)
    return ranked_BMG.transpose(1, 2).flatten(1)


def _sweep(score_BRC: Tensor, order_BC: Tensor, pattern: NM, generator: torch.Generator) -> Tensor:
    """Let every column change places once with one of another group, if that gains."""
    order_BGM = order_BC.unflatten(1, (-1, pattern.m))
    # Other groups and other columns meet than in the sweep before.
    order_BGM = _shuffled(_shuffled(order_BGM, 2, generator), 1, generator)
    problems, groups, m = order_BGM.shape
    parts = -(-groups // _PARTNERS)
    met = groups // parts * parts
    order_PGM = order_BGM[:, :met].clone().view(problems * parts, -1, m)
    score_BRC = _ordered(score_BRC, order_BGM[:, :met].flatten(1))
    score_PRGM = score_BRC.unflatten(2, (parts, -1, m)).transpose(1, 2).flatten(0, 1)
    for slot in range(m):
        column_PRG = score_PRGM[..., slot]
        taken_PG = _exchange(_gains(score_PRGM, slot, pattern))
        score_PRGM[..., slot] = column_PRG.gather(2, taken_PG[:, None].expand(column_PRG.shape))
        order_PGM[..., slot] = order_PGM[..., slot].gather(1, taken_PG)
    order_BGM[:, :met] = order_PGM.view(problems, met, m)
    return order_BGM.flatten(1)


def _shuffled(order_BGM: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    shape = order_BGM.shape if dim == 2 else (*order_BGM.shape[:2], 1)
    shuffle = torch.rand(shape, generator=generator).argsort(dim).to(order_BGM.device)
    return order_BGM.gather(dim, shuffle.expand(order_BGM.shape))


def _gains(score_PRGM: Tensor, slot: int, pattern: NM) -> Tensor:
    """What each group keeps more with a column in its slot than without; (P, group, column).

    Columns are named by the group that holds them. The slot's score s counts in a row as far as
    it exceeds the n-th highest of the others, t. The sum of max(0, s − t) over rows is half of
    ‖s − t‖₁ + Σs − Σt, of which only the norm depends on which column meets which group.
    """
    others_PRGM = torch.cat([score_PRGM[..., :slot], score_PRGM[..., slot + 1 :]], 3)
    kept_PRGM = keep_highest(others_PRGM, pattern.n, dim=3)
    limit_PRG = others_PRGM.masked_fill_(~kept_PRGM, torch.inf).amin(3)
    return torch.cdist(limit_PRG.mT, score_PRGM[..., slot].mT, p=1)


def _exchange(gain_PGG: Tensor) -> Tensor:
    """Swap columns between groups, pair by pair, until no two groups gain by it.

    Args:
        gain_PGG: Value of column c to group g, c being held by group c; for each part.

    Returns:
        taken_PG: The column that each group ends with.
    """
    stay_PG = torch.arange(gain_PGG.shape[1], device=gain_PGG.device).expand(gain_PGG.shape[:2])
    least = _NOISE * gain_PGG.amax()
    taken_PG = stay_PG
    while True:
        own_PG = gain_PGG.diagonal(dim1=1, dim2=2)
        rise_PGG = gain_PGG + gain_PGG.mT - (own_PG[:, :, None] + own_PG[:, None])
        rise_PG, partner_PG = rise_PGG.max(2)
        # Groups that are each other's best partner: such pairs are disjoint, and the best of all
        # pairs is among them.
        agreed_PG = (partner_PG.gather(1, partner_PG) == stay_PG) & (rise_PG > least)
        if not bool(agreed_PG.any()):
            return taken_PG
        swap_PG = partner_PG.where(agreed_PG, stay_PG)
        taken_PG = taken_PG.gather(1, swap_PG)
        gain_PGG = gain_PGG.gather(2, swap_PG[:, None].expand(gain_PGG.shape))
