"""Passes of a block of which a part is looked at: inputs of a part, gradients at linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from secateur.blocks.precision import products_of_bfloat16
from secateur.models.forwards import Reached, hidden_states, replaced_forwards
from secateur.models.structure import Linear


@dataclass(frozen=True)
class Part:
    """A direct child of a block that holds linears, such as attention or MLP, and these."""

    module: nn.Module
    linears: tuple[Linear, ...]


def find_parts(block: nn.Module, linears: tuple[Linear, ...]) -> list[Part]:
    """Return the parts of a block in definition order; together they hold all its linears."""
    parts = []
    for child in block.children():
        inside = set(child.modules())
        held = tuple(linear for linear in linears if linear.module in inside)
        if held:
            parts.append(Part(child, held))
    return parts


@dataclass(frozen=True)
class PartCall:
    """A part and what it was handed in one pass of its block."""

    part: Part
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self) -> Tensor:
        """What the part returns."""
        return hidden_states(self.part.module(*self.args, **self.kwargs)).float()

    def output_with(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What it would return with other weights (out, in), by linear name in the block."""
        module = self.part.module
        names = {id(p): name for name, p in module.named_parameters()}
        values = {
            names[id(linear.module.get_parameter("weight"))]: (
                weights[linear.name].T if linear.transposed else weights[linear.name]
            )
            for linear in self.part.linears
        }
        return hidden_states(functional_call(module, values, self.args, self.kwargs)).float()


def catch_call(part: Part, run: Callable[[], object]) -> PartCall:
    """Run a block up to a part and return what the part is handed."""
    caught: list[PartCall] = []

    def catch(*args: Any, **kwargs: Any) -> None:
        caught.append(PartCall(part, args, kwargs))
        raise Reached

    with replaced_forwards([(part.module, catch)]), suppress(Reached):
        run()
    assert caught, "a part that holds linears runs"
    return caught[0]


@dataclass(frozen=True)
class LinearPass:
    """One call of a linear.

    Attributes:
        linear: the linear.
        x_NI: its inputs (tokens, in).
        output: where gradients of its output arrive.
    """

    linear: Linear
    x_NI: Tensor
    output: GradientEdge


@contextmanager
def recorded_passes(linears: Iterable[Linear]) -> Iterator[list[LinearPass]]:
    """Within the context, list the calls of these linears and record the graph behind them.

    What comes before the first of them has no graph, unless something else asks for one.
    """
    passes: list[LinearPass] = []

    def hook_for(linear: Linear) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)
            x_NI = args[0].detach().flatten(0, -2)
            passes.append(LinearPass(linear, x_NI, get_gradient_edge(output)))

        return record

    with ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.module.register_forward_hook(hook_for(linear)))
        yield passes


def output_gradients(
    scalar: Tensor, passes: Sequence[LinearPass], *, keep_graph: bool = False
) -> Iterator[tuple[LinearPass, Tensor]]:
    """Differentiate a scalar at the outputs of recorded calls.

    Yields:
        Each call that the scalar depends on, and the gradient of its output (tokens, out).
    """
    gradients = torch.autograd.grad(
        scalar, [each.output for each in passes], retain_graph=keep_graph, allow_unused=True
    )
    for each, gradient in zip(passes, gradients, strict=True):
        if gradient is not None:
            yield each, gradient.flatten(0, -2)


def weight_gradient(gradient_NO: Tensor, x_NI: Tensor) -> Tensor:
    """gradientᵀ x, fp32 (out, in); on the bf16 units where the gradient comes from them."""
    rounded = gradient_NO.dtype == torch.bfloat16
    with products_of_bfloat16(x_NI.device) if rounded else nullcontext():
        return gradient_NO.float().T @ x_NI.float()


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

    def add(self, run: Callable[[], Tensor]) -> None:
        """Add the gradients of the scalar that ``run`` returns."""

        def hook_for(total_O: Tensor) -> Callable[[nn.Module, object, Tensor], None]:
            def add_squares(gradient: Tensor) -> None:
                total_O.add_(gradient.flatten(0, -2).float().square().sum(0))

            def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                output.register_hook(add_squares)

            return watch

        with ExitStack() as hooks:
            for linear in self._linears:
                hook = hook_for(self.sums[linear.name])
                hooks.enter_context(linear.module.register_forward_hook(hook))
            with torch.enable_grad():
                scalar = run()
            scalar.backward()


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of ±1 of the same shape and device, drawn on the generator's device."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
    return bits.to(like.device, torch.float32).mul_(2).sub_(1)


def random_projection(
    y_BLD: Tensor, generator: torch.Generator, target_BLD: Tensor | None = None
) -> Tensor:
    """Sum over tokens of <v_t, y_t> / |y_t|, v random signs: a scalar to take gradients of.

    Its squared gradients estimate the relative error of each token's hidden state, which is what
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
