"""Outputs of a block's finished parts, which later passes need not compute again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.structure import find_linears


class Replay:
    """Remembers, batch by batch, what the finished parts of a block return.

    A part is a direct child of the block that holds linears, such as attention. Once all its
    linears are pruned it returns the same for the same batch in every later pass. Use as a
    context manager: on exit the block is as it was.
    """

    def __init__(self, block: nn.Module, linears: Iterable[str] | None = None) -> None:
        """Take the parts of a block.

        Args:
            block: whose parts are to be remembered.
            linears: names of those whose weights change, all if None.
        """
        if linears is None:
            linears = [linear.name for linear in find_linears(block)]
        names = list(linears)
        parts = {
            name: (child, {each for each in names if each.startswith(f"{name}.")})
            for name, child in block.named_children()
        }
        self._all_parts = {name: part for name, part in parts.items() if part[1]}
        self._parts = dict(self._all_parts)
        self._outputs: dict[tuple[str, int], Any] = {}
        self._batch = 0

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def forget(self) -> None:
        """Take all parts as unfinished again."""
        for name in self._all_parts.keys() - self._parts.keys():
            del self._all_parts[name][0].forward
        self._parts = dict(self._all_parts)
        self._outputs.clear()

    def at(self, batch: slice) -> None:
        """Say which batch the next forward pass is for."""
        self._batch = batch.start

    def finish(self, pruned: Collection[str]) -> None:
        """Replay every part whose linears all have their final weights.

        Args:
            pruned: names, inside the block, of the linears that are done.
        """
        open_parts = {name for name, (_, linears) in self._parts.items() if linears - set(pruned)}
        # Once all parts are finished only one pass is to come, and replaying would save no time.
        for name in set(self._parts) - open_parts if open_parts else ():
            part, _ = self._parts.pop(name)
            part.forward = self._replaying(name, part.forward)

    def _replaying(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replay(*args: Any, **kwargs: Any) -> Any:
            key = (name, self._batch)
            if key not in self._outputs:
                self._outputs[key] = _on_cpu(forward(*args, **kwargs))
            device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            return _moved(self._outputs[key], device)

        return replay


def _on_cpu(output: Any) -> Any:
    return _moved(output, torch.device("cpu"))


def _moved(output: Any, device: torch.device) -> Any:
    if isinstance(output, Tensor):
        return output.to(device)
    if isinstance(output, tuple):
        return tuple(_moved(each, device) for each in output)
    return output
