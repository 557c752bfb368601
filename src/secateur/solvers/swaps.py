"""Exchange kept and removed weights by what a quadratic model of the error says of each exchange.

Let Δ be a change of the weights of one output row, g the gradient of the error at the present
weights and b A its curvature, A the mean of x xᵀ over tokens and b how much the error depends on
the row. Then the error changes by

    ⟨g, Δ⟩ + ½ b Δ A Δᵀ,

which is exact if the error is the squared error of the linear's output. Removing a kept weight p
has Δ_p = −w_p, restoring a removed one q has Δ_q = w_q. The exchange of both changes the error by

    −w_p g_p + ½ b A_pp w_p² + w_q g_q + ½ b A_qq w_q² − b A_pq w_p w_q,

and the gradient by b (w_q A_q − w_p A_p), so one gradient serves many exchanges. For the plain
error of a linear, g = b (w − dense) A, this is the exchange of SparseSwaps (arXiv 2512.10922).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from secateur.patterns.pattern import NM, Pattern
from secateur.solvers.gram import check_finite
from secateur.solvers.pieces import row_chunks

# Fewer rows than this make matrix products slow.
_FEWEST_ROWS = 256
# A gain below this many roundings of its largest term is noise.
_NOISE = 16


def swap_weights(
    value_OI: Tensor,
    mask_OI: Tensor,
    gradient_OI: Tensor,
    gram_II: Tensor,
    curvature_O: Tensor,
    pattern: Pattern,
    *,
    rounds: int = 30,
    shortlist: int = 8,
    tolerance: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Exchange weights of a row, under n:m of a group, while the model says that the error falls.

    In each round every row considers some exchanges: of its cheapest weights to remove, each with
    the best of the cheapest to restore, or of the groups where one is worth most. They are made
    one after the other, the best first, each given those before it; then the gradient of the
    whole row follows. Every exchange lowers the model's error, and rows do not affect each other.
    No row, or group, changes its zeros.

    Args:
        value_OI: What each weight is if it is kept.
        mask_OI: True = kept.
        gradient_OI: g, of the error at the weights kept.
        gram_II: A.
        curvature_O: b, not negative.
        pattern: Which the mask has.
        rounds: Most rounds.
        shortlist: Weights of either kind, or groups, that a row considers in a round.
        tolerance: A row stops when a round has gained less than this share of all it has gained.

    Returns:
        The new masks, and the predicted change of the error by each row, at most 0.
    """
    named = {
        "the weights": value_OI,
        "the gradient's entries": gradient_OI,
        "the Gram matrix's entries": gram_II,
        "the curvatures of rows": curvature_O,
    }
    for name, values in named.items():
        check_finite(name, values)
    chosen_OI, change_O = mask_OI.clone(), torch.zeros_like(curvature_O)
    if bool(mask_OI.all()):
        return chosen_OI, change_O
    for rows in row_chunks(mask_OI, _FEWEST_ROWS):
        places: _Places = (
            _InGroups.of(mask_OI[rows], pattern)
            if isinstance(pattern, NM)
            else _InRows.of(mask_OI[rows], value_OI.dtype)
        )
        delta_RI = value_OI[rows] * (1 - 2 * mask_OI[rows].to(value_OI.dtype))
        part = _Rows(delta_RI, gradient_OI[rows].clone(), curvature_O[rows, None], places)
        moving_R = torch.arange(len(mask_OI), device=mask_OI.device)[rows]
        for _ in range(rounds):
            gain_R = part.exchange(gram_II, shortlist)
            change_O[moving_R] += gain_R
            # A row without any gain has not changed, and would find nothing again.
            going_R = gain_R < tolerance * change_O[moving_R]
            if not bool(going_R.all()):
                done_R = ~going_R
                chosen_OI[moving_R[done_R]] = part.places.only(done_R).mask(mask_OI.shape[1])
                part, moving_R = part.only(going_R), moving_R[going_R]
                if not len(moving_R):
                    break
        chosen_OI[moving_R] = part.places.mask(mask_OI.shape[1])
    return chosen_OI, change_O


@dataclass(frozen=True)
class _Rows:
    """Rows in work; delta is what a kept weight's removal, or a removed one's return, adds."""

    delta_RI: Tensor
    gradient_RI: Tensor
    curvature_R1: Tensor
    places: _Places

    def only(self, chosen_R: Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(
            self.delta_RI[chosen_R],
            self.gradient_RI[chosen_R],
            self.curvature_R1[chosen_R],
            self.places.only(chosen_R),
        )

    def exchange(self, gram_II: Tensor, shortlist: int) -> Tensor:
        """Make a round of exchanges; returns the change of the error of each row."""
        model = _Model(gram_II, self.delta_RI, self._costs(gram_II), self.curvature_R1)
        moves = self.places.best(model, shortlist)
        columns_RC = moves.columns_RC
        delta_RC = self.delta_RI.gather(1, columns_RC)
        slope_RC = self.gradient_RI.gather(1, columns_RC) * delta_RC
        noise_R = slope_RC.abs_().amax(1).mul_(_NOISE * torch.finfo(slope_RC.dtype).eps)
        chosen_RK, gain_R = _choose(moves.cost_RK, model.between(moves), noise_R)
        # A weight may be part of several moves. At most one of them is chosen: hence the sums.
        delta_RC *= chosen_RK.repeat(1, 2)
        self.delta_RI.scatter_add_(1, columns_RC, -2 * delta_RC)
        self.gradient_RI.add_(
            functional.embedding_bag(
                columns_RC,
                gram_II,
                per_sample_weights=delta_RC.mul_(self.curvature_R1),
                mode="sum",
            )
        )
        self.places.exchange(moves, chosen_RK)
        return gain_R

    def _costs(self, gram_II: Tensor) -> Tensor:
        """Change of the error by each weight removed, or restored, alone."""
        scaled_RI = self.delta_RI * self.curvature_R1
        cost_RI = torch.addcmul(self.gradient_RI, scaled_RI, gram_II.diagonal(), value=0.5)
        return cost_RI.mul_(self.delta_RI)


@dataclass(frozen=True)
class _Moves:
    """Exchanges that each row considers: columns to remove and to restore, and their costs.

    Attributes:
        removed_RK: Columns to remove.
        restored_RK: Columns to restore.
        cost_RK: Change of the error by each exchange alone.
        slots: Under n:m the group of each, and which of its kept and of its removed weights.
    """

    removed_RK: Tensor
    restored_RK: Tensor
    cost_RK: Tensor
    slots: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def columns_RC(self) -> Tensor:
        """Both, side by side."""
        return torch.cat([self.removed_RK, self.restored_RK], dim=1)


@dataclass(frozen=True)
class _Model:
    """The error's change if weights are removed or restored: alone, and together."""

    gram_II: Tensor
    delta_RI: Tensor
    cost_RI: Tensor
    curvature_R1: Tensor

    def coupling(self, left_RK: Tensor, right_RL: Tensor) -> Tensor:
        """What each column on the left and each on the right cost more together; (R, K, L)."""
        scaled_RK = self.delta_RI.gather(1, left_RK).mul_(self.curvature_R1)
        columns = len(self.gram_II)
        coupling_RKL = self.gram_II.take((left_RK * columns)[:, :, None] + right_RL[:, None, :])
        coupling_RKL *= scaled_RK[:, :, None]
        coupling_RKL *= self.delta_RI.gather(1, right_RL)[:, None, :]
        return coupling_RKL

    def between(self, moves: _Moves) -> Tensor:
        """What two moves cost more together than alone, infinite if they share a weight."""
        columns_RC = moves.columns_RC
        size = moves.cost_RK.shape[1]
        coupling_RCC = self.coupling(columns_RC, columns_RC)
        between_RKK = coupling_RCC.unflatten(1, (2, size)).unflatten(3, (2, size)).sum((1, 3))
        shared_RKK = moves.restored_RK[:, :, None] == moves.restored_RK[:, None, :]
        return torch.where(shared_RKK, torch.inf, between_RKK)


class _Places(Protocol):
    """Which weights are kept, and which of them may change places."""

    def only(self, chosen_R: Tensor) -> Self:
        """Those of some rows."""

    def mask(self, columns: int) -> Tensor:
        """mask_RI, True = kept."""

    def best(self, model: _Model, shortlist: int) -> _Moves:
        """Exchanges to consider."""

    def exchange(self, moves: _Moves, chosen_RK: Tensor) -> None:
        """Make those that were chosen."""


@dataclass(frozen=True)
class _InRows:
    """Any kept weight of a row, and any removed one.

    1 and 0 in floating point: their sums are many times faster than a choice by a random mask.
    """

    kept_RI: Tensor
    removed_RI: Tensor

    @classmethod
    def of(cls, mask_RI: Tensor, dtype: torch.dtype) -> _InRows:
        kept_RI = mask_RI.to(dtype)
        return cls(kept_RI, 1 - kept_RI)

    def only(self, chosen_R: Tensor) -> _InRows:
        return _InRows(self.kept_RI[chosen_R], self.removed_RI[chosen_R])

    def mask(self, columns: int) -> Tensor:
        return self.kept_RI > 0

    def best(self, model: _Model, shortlist: int) -> _Moves:
        """The cheapest weights to remove, each with the best of the cheapest to restore."""
        size = min(shortlist, self.kept_RI.shape[1])
        # Higher than any cost; two such and a cost are still finite.
        barred = torch.finfo(model.cost_RI.dtype).max / 4
        removed_cost_RK, removed_RK = torch.add(model.cost_RI, self.removed_RI, alpha=barred).topk(
            size, largest=False
        )
        restored_cost_RK, restored_RK = torch.add(model.cost_RI, self.kept_RI, alpha=barred).topk(
            size, largest=False
        )
        cost_RKK = model.coupling(removed_RK, restored_RK)
        cost_RKK += removed_cost_RK[:, :, None]
        cost_RKK += restored_cost_RK[:, None, :]
        cost_RK, partner_RK = cost_RKK.min(2)
        return _Moves(removed_RK, restored_RK.gather(1, partner_RK), cost_RK)

    def exchange(self, moves: _Moves, chosen_RK: Tensor) -> None:
        chosen_RK = chosen_RK.to(self.kept_RI.dtype)
        for columns_RK, sign in ((moves.removed_RK, -1), (moves.restored_RK, 1)):
            self.kept_RI.scatter_add_(1, columns_RK, sign * chosen_RK)
            self.removed_RI.scatter_add_(1, columns_RK, -sign * chosen_RK)


@dataclass(frozen=True)
class _InGroups:
    """Columns of the n kept weights of each group, and of the others.

    Groups are the last dimension, so that what concerns all of them runs over long rows.
    """

    kept_NRG: Tensor
    removed_LRG: Tensor

    @classmethod
    def of(cls, mask_RI: Tensor, pattern: NM) -> _InGroups:
        rows, columns = mask_RI.shape
        # Each group has n kept weights and m - n removed ones, so their columns are arrays.
        kept, removed = (
            (chosen_RI.flatten().nonzero() % columns)
            .view(rows, columns // pattern.m, size)
            .permute(2, 0, 1)
            .contiguous()
            for chosen_RI, size in ((mask_RI, pattern.n), (~mask_RI, pattern.m - pattern.n))
        )
        return cls(kept, removed)

    def only(self, chosen_R: Tensor) -> _InGroups:
        return _InGroups(self.kept_NRG[:, chosen_R], self.removed_LRG[:, chosen_R])

    def mask(self, columns: int) -> Tensor:
        rows = self.kept_NRG.shape[1]
        mask_RI = torch.zeros(rows, columns, dtype=torch.bool, device=self.kept_NRG.device)
        for columns_RG in self.kept_NRG:
            mask_RI.scatter_(1, columns_RG, True)
        return mask_RI

    def best(self, model: _Model, shortlist: int) -> _Moves:
        """The best exchange of each group, of the groups where it is worth most."""
        kept_N1RG, removed_LRG = self.kept_NRG[:, None], self.removed_LRG
        scaled_RI = model.delta_RI * model.curvature_R1
        cost_NLRG = model.gram_II.take(kept_N1RG * len(model.gram_II) + removed_LRG)
        cost_NLRG *= _at(scaled_RI, self.kept_NRG)[:, None]
        cost_NLRG *= _at(model.delta_RI, removed_LRG)
        cost_NLRG += _at(model.cost_RI, self.kept_NRG)[:, None]
        cost_NLRG += _at(model.cost_RI, removed_LRG)
        cost_PRG = cost_NLRG.flatten(0, 1)
        size = min(shortlist, cost_PRG.shape[2])
        cost_RK, group_RK = cost_PRG.amin(0).topk(size, largest=False)
        pair_RK = cost_PRG.gather(2, group_RK.expand(len(cost_PRG), -1, -1)).argmin(0)
        others = len(removed_LRG)
        slots = pair_RK // others, pair_RK % others
        removed_RK, restored_RK = (
            columns_SRG.gather(2, group_RK.expand(len(columns_SRG), -1, -1))
            .gather(0, slot_RK[None])
            .squeeze(0)
            for columns_SRG, slot_RK in zip((self.kept_NRG, removed_LRG), slots, strict=True)
        )
        return _Moves(removed_RK, restored_RK, cost_RK, (group_RK, *slots))

    def exchange(self, moves: _Moves, chosen_RK: Tensor) -> None:
        assert moves.slots is not None
        group_RK, *slots = moves.slots
        row_R1 = torch.arange(len(group_RK), device=group_RK.device)[:, None]
        removed_RK, restored_RK = moves.removed_RK, moves.restored_RK
        self.kept_NRG[slots[0], row_R1, group_RK] = torch.where(chosen_RK, restored_RK, removed_RK)
        self.removed_LRG[slots[1], row_R1, group_RK] = torch.where(
            chosen_RK, removed_RK, restored_RK
        )


def _at(values_RI: Tensor, columns_SRG: Tensor) -> Tensor:
    """Values of some columns."""
    return values_RI.expand(len(columns_SRG), -1, -1).gather(2, columns_SRG)


def _choose(cost_RK: Tensor, between_RKK: Tensor, noise_R: Tensor) -> tuple[Tensor, Tensor]:
    """Choose moves one after the other, the best first, each given those before it.

    Args:
        cost_RK: Change of the error by each move alone.
        between_RKK: What two moves cost more together, infinite if they exclude each other.
        noise_R: A move must gain more than this.

    Returns:
        chosen_RK, bool; and the change by all of them, 0 where none helps.
    """
    chosen_RK = torch.zeros_like(cost_RK, dtype=torch.bool)
    change_R = torch.zeros_like(noise_R)
    for _ in range(cost_RK.shape[1]):
        gain_R, move_R = cost_RK.min(1)
        helps_R = gain_R < -noise_R
        if not bool(helps_R.any()):
            break
        move_R1, helps_R1 = move_R[:, None], helps_R[:, None]
        chosen_RK |= torch.zeros_like(chosen_RK).scatter_(1, move_R1, helps_R1)
        change_R += torch.where(helps_R, gain_R, 0)
        rise_RK = between_RKK.gather(1, move_R[:, None, None].expand(-1, 1, cost_RK.shape[1]))[:, 0]
        cost_RK = cost_RK + torch.where(helps_R1, rise_RK, 0)
    return chosen_RK, change_R
