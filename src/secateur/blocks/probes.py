"""How much a block's output depends on each row of its linears, from random probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.models.structure import Linear


class RowSensitivity:
    """Sums, over tokens and probes, the squared gradient of a scalar at each linear's output.

    For a scalar <v, y>, v random signs, the mean of the squared gradient is the diagonal of
    JᵀJ, J the Jacobian of y at that output: the Gauss-Newton curvature of |y - target|².

    Attributes:
        sums: by linear name; (out,), fp32.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self.sums = {
            linear.name: torch.zeros(len(linear.weight_OI), device=linear.weight_OI.device)
            for linear in linears
        }

    def add(self, run: Callable[[], Tensor]) -> Tensor:
        """Add the gradients of the scalar that ``run`` returns; return that scalar, detached."""

        def hook_for(total_O: Tensor) -> Callable[[nn.Module, object, Tensor], None]:
            def add_squares(gradient: Tensor) -> None:
                total_O.add_(gradient.flatten(0, -2).float().square().sum(0))

            def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                output.register_hook(add_squares)

            return watch

        handles = [
            linear.module.register_forward_hook(hook_for(self.sums[linear.name]))
            for linear in self._linears
        ]
        try:
            with torch.enable_grad():
                scalar = run()
            scalar.backward()
        finally:
            for handle in handles:
                handle.remove()
        return scalar.detach()


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of ±1 of the same shape and device, drawn on the generator's device."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
    return bits.to(like.device, torch.float32).mul_(2).sub_(1)


def random_projection(
    y_BLD: Tensor, generator: torch.Generator, target_BLD: Tensor | None = None
) -> Tensor:
    """Sum over tokens of <v_t, y_t> / |y_t|, v random signs: a scalar to take gradients of.

    Its squared gradients foretell the relative error of each token's hidden state, which is what
    counts where every token is normalised by itself.

    Args:
        y_BLD: hidden states with their graph.
        generator: of the signs.
        target_BLD: the hidden states whose norms are taken, if they are others.
    """
    tiny = torch.finfo(torch.float32).tiny
    norms_of_BLD = y_BLD.detach() if target_BLD is None else target_BLD
    scale_BL1 = norms_of_BLD.square().sum(-1, keepdim=True).clamp_min(tiny).rsqrt()
    scalar: Tensor = (y_BLD * (random_signs(y_BLD, generator) * scale_BL1)).sum()
    return scalar
