"""The parts of a block that hold linears, such as attention and MLP, run by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from secateur.blocks.capture import hidden_states
from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear


@dataclass(frozen=True)
class Part:
    """A direct child of a block and the linears in it."""

    module: nn.Module
    linears: tuple[Linear, ...]


class PartCall:
    """What a part was handed in one pass of its block."""

    def __init__(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._part = part
        self._args = args
        self._kwargs = kwargs

    def output(self) -> Tensor:
        """What the part returns."""
        return hidden_states(self._part.module(*self._args, **self._kwargs)).float()

    def output_with(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What it would return with other weights (out, in), by linear name in the block."""
        names = {id(p): name for name, p in self._part.module.named_parameters()}
        values = {
            names[id(linear.module.get_parameter("weight"))]: (
                weights[linear.name].T if linear.transposed else weights[linear.name]
            )
            for linear in self._part.linears
        }
        called = functional_call(self._part.module, values, self._args, self._kwargs)
        return hidden_states(called).float()


def find_parts(block: nn.Module, linears: tuple[Linear, ...]) -> list[Part]:
    """Return the parts of a block in definition order; together they hold all its linears."""
    parts = []
    for child in block.children():
        inside = set(child.modules())
        held = tuple(linear for linear in linears if linear.module in inside)
        if held:
            parts.append(Part(child, held))
    return parts


class _Reached(Exception):
    """Ends a pass where the part would begin."""


def catch_call(part: Part, run: Callable[[], object]) -> PartCall | None:
    """Run a block up to a part and return what the part is handed; None if it is not reached."""
    caught: list[PartCall] = []

    def catch(*args: Any, **kwargs: Any) -> None:
        caught.append(PartCall(part, args, kwargs))
        raise _Reached

    with replaced_forwards([(part.module, catch)]), suppress(_Reached):
        run()
    return caught[0] if caught else None
