"""Walk through a model's blocks, leaving each pruned behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.architecture.experts import unstacked_experts
from secateur.checkpoint.store import BlockStore
from secateur.errors import SecateurError
from secateur.planning import Plan
from secateur.solvers.block_loss import state_error
from secateur.walk.block import BlockPruner
from secateur.walk.pruned import PrunedBlock, Stopwatch
from secateur.walk.replay import Replay
from secateur.walk.streams import Stream


@dataclass(frozen=True)
class WalkedBlock:
    """A block the walk has left behind.

    Attributes:
        index: its number in the model.
        pruned: masks, errors and notes.
        held_out_error: of its output against that of the dense block on the same held-out hidden
            states (``state_error``), mean over tokens.
    """

    index: int
    pruned: PrunedBlock
    held_out_error: float


def walk(
    store: BlockStore,
    stream: Stream,
    dense_stream: Stream | None,
    plan: Plan,
    pruner: BlockPruner,
    device: torch.device,
) -> Iterator[WalkedBlock]:
    """Prune the blocks that ``stream`` has not passed yet, one after the other.

    Every block is saved before it is yielded, and the stream then holds the hidden states that
    the model pruned so far hands to the next block.

    Raises:
        SecateurError: a weight or a hidden state is not finite.
    """
    for index in range(stream.position, len(store.blocks)):
        seconds: dict[str, float] = {}
        watch = Stopwatch(seconds, device)
        block = store.load(index)
        watch.lap("read")
        name = store.blocks.name(index)
        zeros = {
            linear.removeprefix(f"{name}."): count
            for linear, count in plan.zeros.items()
            if linear.startswith(f"{name}.")
        }
        with unstacked_experts(block), Replay(block) as replay:
            targets = pruner.look(block, stream, dense_stream)
            watch.lap("dense outputs")
            pruned = pruner.prune(
                block, name, stream, targets, zeros, store.weight_dtype(index), replay
            )
            watch = Stopwatch(seconds, device)
            error = advance_stream(block, stream, targets.held_out, name, replay)
            watch.lap("advance")
        store.save(index, pruned.masks, pruned.quantised)
        store.release(index)
        watch.lap("write")
        pruned.seconds = {**seconds, **pruned.seconds}
        yield WalkedBlock(index, pruned, error)


def pass_finished(
    store: BlockStore, stream: Stream, dense_stream: Stream | None, count: int
) -> Iterator[int]:
    """Carry the streams through blocks that an earlier session finished, yielding each index."""
    for index in range(stream.position, count):
        if dense_stream is not None:
            with unstacked_experts(block := store.load(index)):
                advance_stream(block, dense_stream, [], store.blocks.name(index))
            store.release(index)
        block = store.load_finished(index)
        # As in the walk itself: stacked experts would round their sums in another order.
        with unstacked_experts(block):
            advance_stream(block, stream, [], store.blocks.name(index))
        store.release(index)
        yield index


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
