"""What the model hands to each of its blocks, taken from the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.forwards import Reached, hidden_states, replaced_forwards
from secateur.models.structure import BlockList


@dataclass(frozen=True)
class BlockCall:
    """Everything a block receives beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        """Run the block on hidden states (batch, length, hidden)."""
        return hidden_states(block(x_BLD, *self.args, **self.kwargs))


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Take the hidden states out of what a block is called with."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    others = dict(kwargs)
    return others.pop("hidden_states"), BlockCall((), others)


@dataclass(frozen=True)
class Captured:
    """Inputs of the first block and the calls of all blocks, for one batch."""

    first_BLD: Tensor
    calls: list[BlockCall]


def capture(blocks: BlockList, token_ids: Tensor, last: int | None = None) -> Captured:
    """Run the model's forward with its blocks passing hidden states through unchanged.

    Args:
        blocks: the model; what lies before the blocks has weights, the blocks need none.
        token_ids: (batch, length).
        last: index of the last block whose call is wanted; the last of the model if None.
    """
    last = len(blocks) - 1 if last is None else last
    inputs: list[Tensor] = []
    calls: list[BlockCall] = []

    def recorder(index: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            x_BLD, call = split_call(args, kwargs)
            inputs.append(x_BLD)
            calls.append(call)
            if index == last:
                raise Reached
            return blocks.returned(index, x_BLD)

        return record

    with (
        replaced_forwards((block, recorder(index)) for index, block in enumerate(blocks)),
        suppress(Reached),
    ):
        blocks.model.base_model(input_ids=token_ids, use_cache=False)
    return Captured(inputs[0], calls)


def logits_after(blocks: BlockList, token_ids: Tensor, last_BLD: Tensor) -> Tensor:
    """Run what comes after the blocks on the last one's output, with its graph.

    Args:
        blocks: the model; what lies outside the blocks has weights, the blocks need none.
        token_ids: (batch, length), those the hidden states belong to.
        last_BLD: what the last block returns.

    Returns:
        logits (batch, length, vocabulary).
    """

    def returning(value: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: value

    with replaced_forwards(
        (block, returning(blocks.returned(index, last_BLD))) for index, block in enumerate(blocks)
    ):
        logits: Tensor = blocks.model(input_ids=token_ids, use_cache=False).logits
    return logits


def same_calls(left: Sequence[BlockCall], right: Sequence[BlockCall]) -> bool:
    """Whether two batches of the same shape gave their blocks the same calls."""
    return all(
        _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
        for a, b in zip(left, right, strict=True)
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and left.shape == right.shape
            and bool(torch.equal(left, right))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right)
