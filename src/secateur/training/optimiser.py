"""AdamW in which removed weights decay as well, annealed as in AST."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from secateur.training.masks import as_factor
from secateur.training.ranks import ALONE, Ranks

DecayPlace = Literal["inside", "outside"]
DecayNorm = Literal["l2", "l1"]
SecondMoment = Literal["update", "gradient"]

# So many numbers at a time stay in a processor's cache through all operations of an update.
_CACHED = 2**16


class MaskedAdamW:
    """AdamW for all parameters; removed weights are drawn to zero besides.

    With ``decay_place="inside"`` it follows the AST recipe for masked parameters: with g the
    gradient, m the mask, γ the learning rate and λ the decay,

        M ← β₁ M + (1 − β₁) g        U = M + λ (1 − m)∘w
        v ← β₂ v + (1 − β₂) U²       w ← w − γ / (1 − β₁ᵗ) · U / (√(v / (1 − β₂ᵗ)) + ε)

    (``second_moment="gradient"`` takes g² for U², as Adam does). With ``"outside"`` the update is
    AdamW's, and w ← w (1 − γλ) for removed weights, which means the same in every model. With
    ``decay_norm="l1"`` besides, a removed weight loses γλ · √(v̄ / v), with v̄ the mean of v over
    its linear, and stops at zero: a decay by absolute value in Adam's metric, after CAST (arXiv
    2509.25996). At λ = 1 that is about as far as an update moves a weight.

    Attributes:
        parameters: by name.
        masks: True = kept, of those parameters that have one, in their layout.
        first: running means of gradients.
        second: running means of squares.
        steps: updates done.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        decay_place: DecayPlace = "inside",
        decay_norm: DecayNorm = "l2",
        second_moment: SecondMoment = "update",
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = dict(parameters)
        self.masks = dict(masks)
        self.first = {name: torch.zeros_like(p.data) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p.data) for name, p in parameters.items()}
        self.steps = 0
        self._betas = betas
        self._epsilon = epsilon
        self._weight_decay = weight_decay
        self._decay_place = decay_place
        self._decay_norm = decay_norm
        self._second_moment = second_moment
        self._ranks = ranks

    @torch.no_grad()
    def step(self, learning_rate: float, decay: float) -> None:
        """Update every parameter that has a gradient.

        Args:
            learning_rate: γ.
            decay: λ, of removed weights.
        """
        self.steps += 1
        inside = self._decay_place == "inside"
        followed = set(self.masks) if inside else set()
        self._adamw([name for name in self.parameters if name not in followed], learning_rate)
        if inside:
            for name, mask in self.masks.items():
                self._annealed(name, mask, learning_rate, decay)
        elif decay > 0 and self._decay_norm == "l1":
            self._lower_removed(learning_rate * decay)
        elif decay > 0:
            for name, mask in self.masks.items():
                weight = self.parameters[name].data
                _in_chunks(_shrink, weight, mask, factor=1 - learning_rate * decay)

    def forget_removed(self) -> None:
        """Clear the moments of removed weights, so that they will not move again."""
        for name, mask in self.masks.items():
            for moment in (self.first[name], self.second[name]):
                moment.mul_(as_factor(mask, moment.dtype))

    def state(self) -> dict[str, Tensor]:
        """The moments by name, for a checkpoint; views, not copies."""
        kinds = {"first": self.first, "second": self.second}
        return {f"{kind}.{name}": t for kind, all_ in kinds.items() for name, t in all_.items()}

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what ``state`` returned after so many steps."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.steps = steps

    def _adamw(self, names: list[str], learning_rate: float) -> None:
        # Vectors, norm gains and biases, are not drawn to zero.
        for decayed in (True, False):
            group = [n for n in names if (self.parameters[n].ndim >= 2) == decayed]
            group = [n for n in group if self.parameters[n].grad is not None]
            if not group:
                continue
            device = self.parameters[group[0]].device
            adamw(
                [self.parameters[n] for n in group],
                [g for n in group if (g := self.parameters[n].grad) is not None],
                [self.first[n] for n in group],
                [self.second[n] for n in group],
                [],
                # The kernel counts the step itself.
                [torch.full((), self.steps - 1.0, device=device) for _ in group],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=learning_rate,
                weight_decay=self._weight_decay if decayed else 0.0,
                eps=self._epsilon,
                maximize=False,
            )

    def _lower_removed(self, by: float) -> None:
        # Several processes hold rows of the same linears, and only together know their means.
        sums = torch.stack([self.second[name].sum() for name in self.masks])
        counts = torch.tensor([float(self.second[name].numel()) for name in self.masks])
        counts = counts.to(sums.device)
        self._ranks.sum([sums, counts])
        means = (sums / counts).sqrt().tolist()
        for (name, mask), mean in zip(self.masks.items(), means, strict=True):
            tensors = (self.parameters[name].data, mask, self.second[name])
            _in_chunks(_lower, *tensors, by=by, mean=mean)

    def _annealed(self, name: str, mask: Tensor, learning_rate: float, decay: float) -> None:
        weight = self.parameters[name]
        if weight.grad is None:
            return
        tensors = (weight.data, weight.grad, self.first[name], self.second[name], mask)
        _in_chunks(
            annealed_update,
            *tensors,
            step=self.steps,
            learning_rate=learning_rate,
            decay=decay,
            betas=self._betas,
            epsilon=self._epsilon,
            weight_decay=self._weight_decay,
            second_moment=self._second_moment,
        )


def annealed_update(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    *,
    step: int,
    learning_rate: float,
    decay: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    second_moment: SecondMoment,
) -> None:
    """One update of AST in place, on tensors of one shape; ``step`` counts from 1."""
    weight.mul_(1 - learning_rate * weight_decay)
    first.lerp_(gradient, 1 - betas[0])
    # The mask is a bool and is negated as one: complementing integers decays what is kept.
    removed = as_factor(~mask, weight.dtype)
    update = torch.addcmul(first, weight, removed, value=decay) if decay else first
    square_of = update if second_moment == "update" else gradient
    second.mul_(betas[1]).addcmul_(square_of, square_of, value=1 - betas[1])
    scale = (second / (1 - betas[1] ** step)).sqrt_().add_(epsilon)
    weight.addcdiv_(update, scale, value=-learning_rate / (1 - betas[0] ** step))


def _shrink(weight: Tensor, mask: Tensor, *, factor: float) -> None:
    weight.mul_(1 - (1 - factor) * as_factor(~mask, weight.dtype))


def _lower(weight: Tensor, mask: Tensor, second: Tensor, *, by: float, mean: float) -> None:
    least = torch.finfo(weight.dtype).tiny
    lost = second.sqrt().clamp_min_(least).reciprocal_().mul_(by * mean)
    lowered = (weight.abs() - lost).clamp_min_(0).copysign_(weight)
    torch.where(mask, weight, lowered, out=weight)


def _in_chunks(function: Callable[..., None], *tensors: Tensor, **options: object) -> None:
    """Call an elementwise function on parts of contiguous tensors, whole where memory is fast."""
    size = _CACHED if tensors[0].device.type == "cpu" else tensors[0].numel()
    for parts in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
        function(*parts, **options)
