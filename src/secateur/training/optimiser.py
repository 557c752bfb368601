"""AdamW in which removed weights decay as well, annealed as in AST."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from secateur.training.masks import as_factor
from secateur.training.options import DecayOptions, OptimiserOptions
from secateur.training.ranks import ALONE, Ranks

# This many numbers stay in a processor's cache through all operations of an update.
_CACHED = 2**16


class MaskedAdamW:
    """AdamW for all parameters; removed weights are drawn to zero besides.

    A decay ``inside`` follows the AST recipe for masked parameters. With g the gradient, m the
    mask, γ the learning rate and λ the decay,

        M ← β₁ M + (1 − β₁) g        U = M + λ (1 − m)∘w
        v ← β₂ v + (1 − β₂) U²       w ← w − γ / (1 − β₁ᵗ) · U / (√(v / (1 − β₂ᵗ)) + ε)

    where the second moment of the ``gradient`` takes g² for U², as Adam does. ``outside``, the
    update is AdamW's, and w ← w (1 − γλ) for removed weights. With the norm ``l1`` a removed
    weight loses γλ · √(v̄ / v) instead, v̄ the mean of v over its linear, and stops at zero: a
    decay by absolute value in Adam's metric, after CAST (arXiv 2509.25996). At λ = 1 that is about
    as far as an update moves a weight.

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
        options: OptimiserOptions,
        decay: DecayOptions,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = dict(parameters)
        self.masks = dict(masks)
        self.first = {name: torch.zeros_like(p.data) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p.data) for name, p in parameters.items()}
        self.steps = 0
        self._options = options
        self._decay = decay
        self._ranks = ranks

    @torch.no_grad()
    def step(self, learning_rate: float, decay: float) -> None:
        """Update every parameter that has a gradient.

        Args:
            learning_rate: γ.
            decay: λ, of removed weights.
        """
        self.steps += 1
        inside = self._decay.place == "inside"
        annealed = set(self.masks) if inside else set()
        self._adamw([name for name in self.parameters if name not in annealed], learning_rate)
        if inside:
            for name, mask in self.masks.items():
                self._annealed(name, mask, learning_rate, decay)
        elif decay > 0 and self._decay.norm == "l1":
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

    def _adamw(self, names: list[str], learning_rate: float) -> None:
        options = self._options
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
                beta1=options.betas[0],
                beta2=options.betas[1],
                lr=learning_rate,
                weight_decay=options.weight_decay if decayed else 0.0,
                eps=options.epsilon,
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
            options=self._options,
            step=self.steps,
            learning_rate=learning_rate,
            decay=decay,
        )


def annealed_update(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    *,
    options: OptimiserOptions,
    step: int,
    learning_rate: float,
    decay: float,
) -> None:
    """One update of AST in place, on tensors of one shape; ``step`` counts from 1."""
    betas = options.betas
    weight.mul_(1 - learning_rate * options.weight_decay)
    first.lerp_(gradient, 1 - betas[0])
    # The mask is a bool and is negated as one: complementing integers decays what is kept.
    removed = as_factor(~mask, weight.dtype)
    update = torch.addcmul(first, weight, removed, value=decay) if decay else first
    square_of = update if options.second_moment == "update" else gradient
    second.mul_(betas[1]).addcmul_(square_of, square_of, value=1 - betas[1])
    scale = (second / (1 - betas[1] ** step)).sqrt_().add_(options.epsilon)
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
