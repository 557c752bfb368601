"""Dense weights tied to their projection onto a pattern by ADMM, after ELSA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import as_factor


class Splitting:
    """The copies z and the scaled dual variables u of the weights w of all masked linears.

    To minimise the loss over z of the pattern, ELSA (Lee et al. 2025, arXiv 2510.01650) trains w
    under w = z. With g the clipped gradient, ρ the penalty and Π the projection,

        g ← g + ρ (w − z + u)                     before each step of Adam
        z ← Π(w + u)        u ← u + w − z         at each choice of the masks

    from z = Π(w) and u = 0. What Π keeps it leaves as it is, so behind each choice z = m∘s and
    u = (1 − m)∘s with s = w + u: one tensor and the mask hold both.

    Attributes:
        sums: s by name of the linear, fp32 in the layout of its weight.
    """

    @torch.no_grad()
    def __init__(self, linears: Sequence[MaskedLinear], penalty: float) -> None:
        self._linears = linears
        self._penalty = penalty
        self.sums: dict[str, Tensor] = {
            each.name: each.weight * as_factor(each.mask, each.weight.dtype) for each in linears
        }

    @torch.no_grad()
    def pull(self) -> None:
        """Add the gradient of ρ/2 · ‖w − z + u‖² to that of every weight."""
        for each in self._linears:
            gradient, sums = each.weight.grad, self.sums[each.name]
            if gradient is not None:
                sign = as_factor(each.mask, sums.dtype).mul_(-2).add_(1)
                gradient.add_(each.weight, alpha=self._penalty)
                gradient.addcmul_(sums, sign, value=self._penalty)

    @torch.no_grad()
    def advance(self) -> None:
        """Make s of the present weights; masks are to be chosen from it next."""
        for each in self._linears:
            sums = self.sums[each.name]
            sums.mul_(as_factor(~each.mask, sums.dtype)).add_(each.weight)
