"""The loop over the blocks of a model, and a stream of hidden states that moves past each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.blocks.replay import Replay
from secateur.blocks.streams import Stream
from secateur.models.store import BlockStore
from secateur.runs.errors import SecateurError
from secateur.solvers.block_loss import state_error


@contextmanager
def loaded(store: BlockStore, index: int, *, finished: bool = False) -> Iterator[nn.Module]:
    """Within the context a block has weights: its dense ones, or those saved for it before."""
    block = store.load_finished(index) if finished else store.load(index)
    try:
        yield block
    finally:
        store.release(index)


def loaded_blocks(
    store: BlockStore, indices: Iterable[int] | None = None, *, finished: bool = False
) -> Iterator[tuple[int, str, nn.Module]]:
    """Give out blocks, each loaded for its turn alone: index, full name, module.

    Args:
        store: the model.
        indices: which blocks, in which order; all of them if None.
        finished: give out the blocks as they were saved before.
    """
    for index in range(len(store.blocks)) if indices is None else indices:
        with loaded(store, index, finished=finished) as block:
            yield index, store.blocks.name(index), block


def pass_block(store: BlockStore, stream: Stream, *, finished: bool = False) -> None:
    """Load the block that the stream enters next, and move the stream past it."""
    index = stream.position
    with loaded(store, index, finished=finished) as block:
        advance_stream(block, stream, [], store.blocks.name(index))


def advance_stream(
    block: nn.Module,
    stream: Stream,
    dense: Sequence[Tensor],
    name: str,
    replay: Replay | None = None,
) -> float:
    """Move the stream past the block.

    Args:
        block: with the weights it is saved with.
        stream: whose position is the block.
        dense: what the dense block returns on the held-out batches, or nothing.
        name: of the block.
        replay: knows outputs of its finished parts.

    Returns:
        the error against the dense outputs, 0 without any.

    Raises:
        SecateurError: a hidden state is not finite.
    """
    error, tokens = 0.0, 0
    for batch in stream.batches.fitted:
        _require_finite(stream.advance(block, batch, replay), name)
    for number, batch in enumerate(stream.batches.held_out):
        y_BLD = stream.advance(block, batch, replay)
        _require_finite(y_BLD, name)
        if dense:
            error_BL = state_error(y_BLD, dense[number].to(y_BLD.device))
            error += float(error_BL.sum(dtype=torch.float64))
            tokens += error_BL.numel()
    stream.position += 1
    return error / max(tokens, 1)


def _require_finite(y_BLD: Tensor, name: str) -> None:
    # The sum carries NaN and infinities without a temporary of the stream's size.
    if not bool(torch.isfinite(y_BLD.sum(dtype=torch.float64))):
        raise SecateurError(
            f"The output of block {name} contains NaN or infinite values; try --dtype float32, and "
            "check that the model itself runs on this text."
        )
