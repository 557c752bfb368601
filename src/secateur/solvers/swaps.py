"""Exchange kept and removed weights by what a quadratic model of the error says of each exchange.

Let Δ be a change of the weights of one output row, g the gradient of the error at the present
weights and b A its curvature, A the mean of x xᵀ over tokens and b how much the error depends on
the row. Then the error changes by

    ⟨g, Δ⟩ + ½ b Δ A Δᵀ,

which is exact if the error is the squared error of the linear's output. Removing a kept weight p
has Δ_p = −w_p, restoring a removed one q has Δ_q = w_q, so that the exchange of both changes it by

    −w_p g_p + ½ b A_pp w_p² + w_q g_q + ½ b A_qq w_q² − b A_pq w_p w_q,

and the gradient by b (w_q A_q − w_p A_p). So one look at the model serves many exchanges. For the
plain error of a linear, g = b (w − dense) A, this is the exchange of SparseSwaps
(arXiv 2512.10922).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pattern import NM, Pattern
from secateur.solvers.chunks import row_chunks
from secateur.solvers.finite import check_finite

# Fewer rows than this make matrix products slow.
_FEWEST_ROWS = 256
# A gain below so many roundings of what it is the sum of is noise.
_NOISE = 16


@dataclass(frozen=True)
class Swaps:
    """Masks after exchanges.

    Attributes:
        mask_OI: bool, True = kept.
        change_O: Predicted change of the error by each row, at most 0.
    """

    mask_OI: Tensor
    change_O: Tensor


def predicted_change(
    delta_OI: Tensor, gradient_OI: Tensor, gram_II: Tensor, curvature_O: Tensor
) -> Tensor:
    """⟨g, Δ⟩ + ½ b Δ A Δᵀ for each row; (out,)."""
    slope_OI = torch.addmm(gradient_OI, delta_OI * (0.5 * curvature_O[:, None]), gram_II)
    change_O: Tensor = torch.linalg.vecdot(slope_OI, delta_OI)
    return change_O


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
) -> Swaps:
    """Exchange weights of a row, under n:m of a group, while the model says that the error falls.

    In each round every row considers some exchanges: of its cheapest weights to remove, each with
    the best of the cheapest to restore, or of the groups where one is worth most. They are made
    one after the other, the best first, each given those before it; then the gradient of the
    whole row follows. Every exchange lowers the model's error, and no row concerns another.

    Args:
        value_OI: What each weight is if it is kept; fp32 or float64.
        mask_OI: bool, True = kept.
        gradient_OI: g, of the error at the weights kept.
        gram_II: A, symmetric.
        curvature_O: b, not negative.
        pattern: Kind of mask, which ``mask_OI`` has.
        rounds: Most rounds.
        shortlist: Weights of either kind, or groups, that a row considers in a round.
        tolerance: A row stops when a round has gained less than this share of all it has gained.

    Returns:
        New masks, with as many zeros in each row, or group, as before.

    Raises:
        SecateurError: Weights, gradient, Gram matrix or curvature are not finite.
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
        return Swaps(chosen_OI, change_O)
    for rows in row_chunks(mask_OI, _FEWEST_ROWS):
        mask_RI, value_RI = mask_OI[rows], value_OI[rows]
        delta_RI = torch.where(mask_RI, -value_RI, value_RI)
        part = _Rows(delta_RI, mask_RI, gradient_OI[rows], curvature_O[rows, None])
        moving_R = torch.arange(len(mask_OI), device=mask_OI.device)[rows]
        for _ in range(rounds):
            part, gain_R = part.after_round(gram_II, pattern, shortlist)
            chosen_OI[moving_R] = part.mask_RI
            change_O[moving_R] += gain_R
            # Without any gain a row has not changed, and would find nothing again.
            going_R = gain_R < tolerance * change_O[moving_R]
            part, moving_R = part.only(going_R), moving_R[going_R]
            if not len(moving_R):
                break
    return Swaps(chosen_OI, change_O)


@dataclass(frozen=True)
class _Rows:
    """Rows in work; delta is what removing a kept weight, or restoring a removed one, adds."""

    delta_RI: Tensor
    mask_RI: Tensor
    gradient_RI: Tensor
    curvature_R1: Tensor

    def only(self, chosen_R: Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(
            self.delta_RI[chosen_R],
            self.mask_RI[chosen_R],
            self.gradient_RI[chosen_R],
            self.curvature_R1[chosen_R],
        )

    def after_round(
        self, gram_II: Tensor, pattern: Pattern, shortlist: int
    ) -> tuple[_Rows, Tensor]:
        """The rows after a round of exchanges, and the change of the error of each."""
        model = _Model(gram_II, self.delta_RI, self._costs(gram_II), self.curvature_R1)
        if isinstance(pattern, NM):
            moves = _best_in_groups(model, self.mask_RI, pattern, shortlist)
        else:
            moves = _best_in_rows(model, self.mask_RI, shortlist)
        columns_RC = torch.cat([moves.removed_RK, moves.restored_RK], dim=1)
        slope_RC = self.gradient_RI.gather(1, columns_RC) * self.delta_RI.gather(1, columns_RC)
        noise_R = slope_RC.abs_().amax(1).mul_(_NOISE * torch.finfo(slope_RC.dtype).eps)
        chosen_RK, gain_R = _choose(moves.cost_RK, model.between(moves), noise_R)
        # A weight may be part of several moves, of which one at most is chosen: hence the sum.
        flipped_RI = torch.zeros_like(self.delta_RI).scatter_add_(
            1, columns_RC, chosen_RK.repeat(1, 2).to(self.delta_RI.dtype)
        )
        change_RI = self.delta_RI * flipped_RI
        delta_RI = self.delta_RI.sub(change_RI, alpha=2)
        mask_RI = self.mask_RI ^ (flipped_RI > 0)
        gradient_RI = torch.addmm(self.gradient_RI, change_RI.mul_(self.curvature_R1), gram_II)
        return _Rows(delta_RI, mask_RI, gradient_RI, self.curvature_R1), gain_R

    def _costs(self, gram_II: Tensor) -> Tensor:
        """Change of the error by each weight removed, or restored, alone."""
        cost_RI = self.delta_RI * gram_II.diagonal()
        cost_RI *= 0.5 * self.curvature_R1
        cost_RI += self.gradient_RI
        cost_RI *= self.delta_RI
        return cost_RI


@dataclass(frozen=True)
class _Moves:
    """Exchanges that each row considers: columns to remove and to restore, and their costs."""

    removed_RK: Tensor
    restored_RK: Tensor
    cost_RK: Tensor


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
        columns_RC = torch.cat([moves.removed_RK, moves.restored_RK], dim=1)
        size = moves.cost_RK.shape[1]
        coupling_RCC = self.coupling(columns_RC, columns_RC)
        between_RKK = coupling_RCC.unflatten(1, (2, size)).unflatten(3, (2, size)).sum((1, 3))
        shared_RKK = moves.restored_RK[:, :, None] == moves.restored_RK[:, None, :]
        return torch.where(shared_RKK, torch.inf, between_RKK)


def _best_in_rows(model: _Model, mask_RI: Tensor, shortlist: int) -> _Moves:
    """The cheapest weights to remove, each with the best of the cheapest to restore."""
    size = min(shortlist, mask_RI.shape[1])
    removed_cost_RK, removed_RK = torch.where(mask_RI, model.cost_RI, torch.inf).topk(
        size, largest=False
    )
    restored_cost_RK, restored_RK = torch.where(mask_RI, torch.inf, model.cost_RI).topk(
        size, largest=False
    )
    cost_RKK = model.coupling(removed_RK, restored_RK)
    cost_RKK += removed_cost_RK[:, :, None]
    cost_RKK += restored_cost_RK[:, None, :]
    cost_RK, partner_RK = cost_RKK.min(2)
    return _Moves(removed_RK, restored_RK.gather(1, partner_RK), cost_RK)


def _best_in_groups(model: _Model, mask_RI: Tensor, pattern: NM, shortlist: int) -> _Moves:
    """The best exchange of each group, of the groups where it is worth most."""
    rows, columns = mask_RI.shape
    groups, n, m = columns // pattern.m, pattern.n, pattern.m
    # Each group has n kept weights and m - n removed ones, so their positions are arrays.
    kept_RGN = mask_RI.flatten().nonzero().view(rows, groups, n)
    removed_RGL = (~mask_RI).flatten().nonzero().view(rows, groups, m - n)
    scaled_RI = model.delta_RI * model.curvature_R1
    inputs_RGNL = (kept_RGN % columns * columns)[..., None] + (removed_RGL % columns)[..., None, :]
    cost_RGNL = model.gram_II.take(inputs_RGNL)
    cost_RGNL *= scaled_RI.take(kept_RGN)[..., None]
    cost_RGNL *= model.delta_RI.take(removed_RGL)[..., None, :]
    cost_RGNL += model.cost_RI.take(kept_RGN)[..., None]
    cost_RGNL += model.cost_RI.take(removed_RGL)[..., None, :]
    cost_RG, pair_RG = cost_RGNL.flatten(2).min(2)
    cost_RK, group_RK = cost_RG.topk(min(shortlist, groups), largest=False)
    pair_RK = pair_RG.gather(1, group_RK)
    kept_RK = kept_RGN.flatten(1).gather(1, group_RK * n + pair_RK // (m - n))
    removed_RK = removed_RGL.flatten(1).gather(1, group_RK * (m - n) + pair_RK % (m - n))
    return _Moves(kept_RK % columns, removed_RK % columns, cost_RK)


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
