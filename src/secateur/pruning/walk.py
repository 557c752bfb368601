"""Walk through the blocks of a model and prune one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from secateur.blocks.loop import advance_stream
from secateur.blocks.replay import Replay
from secateur.blocks.streams import Stream
from secateur.models.experts import unstacked_experts
from secateur.models.store import BlockStore
from secateur.models.structure import find_linears
from secateur.patterns.plan import Plan
from secateur.pruning.block import BlockPruner
from secateur.pruning.pruned import OpenBlock, PrunedBlock
from secateur.runs.meter import Stopwatch


def walk(
    store: BlockStore,
    stream: Stream,
    dense_stream: Stream | None,
    plan: Plan,
    pruner: BlockPruner,
    device: torch.device,
) -> Iterator[PrunedBlock]:
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
            pruned = PrunedBlock(index)
            linears = tuple(find_linears(block))
            stored = store.weight_dtype(index)
            work = OpenBlock(name, block, linears, stream, zeros, stored, replay, pruned)
            pruner.prune(work, targets)
            watch = Stopwatch(seconds, device)
            pruned.held_out_error = advance_stream(block, stream, targets.held_out, name, replay)
            watch.lap("advance")
        store.save(index, pruned.masks, pruned.quantised)
        store.release(index)
        watch.lap("write")
        pruned.seconds = {**seconds, **pruned.seconds}
        yield pruned


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
