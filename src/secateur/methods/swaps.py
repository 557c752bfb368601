"""Swaps: exchange weights by gradient and curvature of the block's error."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.blocks.inputs import InputAccumulator
from secateur.blocks.passes import (
    Part,
    find_parts,
    output_gradients,
    random_projection,
    recorded_passes,
    weight_gradient,
)
from secateur.blocks.tasks import BlockTask
from secateur.methods.rebuild import Rebuild, kept_values
from secateur.methods.stage import BlockStage
from secateur.models.structure import Linear
from secateur.solvers.block_loss import relative_error
from secateur.solvers.swaps import swap_weights

# The gradient at a row has two terms: the row's own error, g = b (w − dense) A, and the rest, that
# of everything else in the block. The rest reaches many rows at once. If each of them made up for
# all of it, they would overshoot; only the rows of a part's last linear are outputs of their own.
# So masks are tried for several shares of the rest: at the linears of a part, and at its last one.
_OWN = {"each row's own error": (0.0, 0.0)}
_SHARED = {
    "a quarter of the rest": (0.25, 0.25),
    "all of it at the last linear": (0.25, 1.0),
}


class Swaps(BlockStage):
    """Exchange removed and kept weights while a quadratic model of the block's error falls."""

    chooses_mask: ClassVar[bool] = False
    repeats: ClassVar[tuple[str, ...]] = ("rounds",)

    method: Literal["swaps"] = "swaps"
    rounds: int = Field(30, ge=1, le=10_000, description="most rounds of exchanges")
    shortlist: int = Field(
        8,
        ge=1,
        le=10_000,
        description="weights to remove and to restore that a row considers in a round",
    )
    gradient: Literal["rows", "block"] = Field(
        "rows",
        description="of each row's own error, or also of all that the block has lost, in shares "
        "between which held-out text decides: about three times the work",
    )

    @property
    def _shares(self) -> dict[str, tuple[float, float]]:
        return _OWN if self.gradient == "rows" else _OWN | _SHARED

    def passes(self, sequences: int) -> float:
        # Forward and backward, to the block's beginning and to that of the MLP; Gram matrices; and
        # the held-out third, before and after each offer to one of two parts.
        backward = 3 if self.gradient == "rows" else 5
        return 2 + backward + 1 + (1 + 2 * len(self._shares)) / 3

    def apply(self, task: BlockTask) -> None:
        rebuild = Rebuild(task, self.method)
        for part in find_parts(task.block, task.linears):
            seen, last = self._look(task, part)
            candidates: dict[str, dict[str, Tensor]] = {name: {} for name in self._shares}
            for linear in part.linears:
                shares = {
                    name: at_last if linear.name == last else before
                    for name, (before, at_last) in self._shares.items()
                }
                masks = self._swapped(task, linear, seen.pop(linear.name), set(shares.values()))
                for name, share in shares.items():
                    candidates[name][linear.name] = masks[share]
            rebuild.offer(part, candidates)
        rebuild.note()

    def _swapped(
        self, task: BlockTask, linear: Linear, statistics: _Statistics, shares: Collection[float]
    ) -> dict[float, Tensor]:
        """Masks of a linear, for each share of the gradient's second term."""
        gram_II, curvature_O = statistics.curvature()
        value_OI = kept_values(task, linear.name, linear.weight_OI)
        before_OI = task.masks[linear.name].to(task.device)
        lost_OI = linear.weight_OI - task.dense[linear.name]
        own_OI = lost_OI.mul_(curvature_O[:, None]) @ gram_II
        whole_OI = statistics.gradient() if self.gradient == "block" else own_OI
        masks: dict[float, Tensor] = {}
        mask_OI = before_OI
        for share in sorted(shares):
            # The mask of another share is a good start; the gradient has to follow it.
            moved_OI = value_OI * (mask_OI.float() - before_OI.float()) * curvature_O[:, None]
            mask_OI, _ = swap_weights(
                value_OI,
                mask_OI,
                torch.addmm(own_OI.lerp(whole_OI, share), moved_OI, gram_II),
                gram_II,
                curvature_O,
                task.pattern,
                rounds=self.rounds,
                shortlist=self.shortlist,
            )
            masks[share] = mask_OI
        return masks

    def _look(self, task: BlockTask, part: Part) -> tuple[dict[str, _Statistics], str]:
        """Gradient and curvature of the block's error by linear name, and the last name to run."""
        seen = {linear.name: _Statistics(linear) for linear in part.linears}
        for batch in task.fitted_batches(self.batch_sequences):
            target_BLD = task.target(batch)
            with recorded_passes(part.linears) as passes:
                y_BLD = task.output(batch)
            if self.gradient == "block":
                error = relative_error(y_BLD, target_BLD).sum()
                for each, gradient_NO in output_gradients(error, passes, keep_graph=True):
                    seen[each.linear.name].add_gradient(each.x_NI, gradient_NO)
            probe = random_projection(y_BLD, task.generator, target_BLD)
            for each, gradient_NO in output_gradients(probe, passes):
                seen[each.linear.name].add_probe(each.x_NI, gradient_NO)
            for statistics in seen.values():
                statistics.tokens += y_BLD[..., 0].numel()
        return seen, passes[-1].linear.name


class _Statistics:
    """Gradient and curvature of the mean relative error of a block's tokens at one linear.

    With v random signs over hidden features, r_t the output's change and |o_t| the norm it is
    relative to, the error's curvature at a linear's outputs is that of Σ_t ⟨v, r_t⟩² / |o_t|².
    For the output z of the linear and g_tj = ∂ Σ_t ⟨v, y_t⟩ / |o_t| / ∂z_tj, row j has the
    curvature 2 Σ_t g_tj² x_t x_tᵀ / tokens. The squares are taken for a product of one factor per
    row and one per token, as they are for the block's last linear.
    """

    def __init__(self, linear: Linear) -> None:
        weight_OI = linear.weight_OI
        self.tokens = 0
        self._size = weight_OI.shape
        self._gradient_OI: Tensor | None = None
        self._square_O = torch.zeros(len(weight_OI), device=weight_OI.device)
        self._inputs: InputAccumulator | None = None

    def add_gradient(self, x_NI: Tensor, gradient_NO: Tensor) -> None:
        """Add the gradient of the error's sum over tokens."""
        gradient_OI = weight_gradient(gradient_NO, x_NI)
        if self._gradient_OI is not None:
            gradient_OI += self._gradient_OI
        self._gradient_OI = gradient_OI

    def add_probe(self, x_NI: Tensor, gradient_NO: Tensor) -> None:
        """Add the gradient of a random projection."""
        square_NO = gradient_NO.float().square()
        self._square_O += square_NO.sum(0)
        if self._inputs is None:
            width = x_NI.shape[1]
            self._inputs = InputAccumulator(width, "gram", x_NI.device, gradient_NO.dtype)
        self._inputs.add(x_NI * square_NO.sum(1, keepdim=True).sqrt())

    def gradient(self) -> Tensor:
        """∂E/∂W, (out, in)."""
        if self._gradient_OI is None:
            return self._square_O.new_zeros(self._size)
        return self._gradient_OI.div_(max(self.tokens, 1))

    def curvature(self) -> tuple[Tensor, Tensor]:
        """gram_II and curvature_O; the curvature of row j is curvature_j · gram."""
        if self._inputs is None:
            width = self._size[1]
            return self._square_O.new_zeros(width, width), self._square_O
        gram_II = self._inputs.gram()
        tiny = torch.finfo(torch.float32).tiny
        share_O = self._square_O / self._square_O.sum().clamp_min(tiny)
        return gram_II, share_O * (2 * self._inputs.tokens / max(self.tokens, 1))
