"""Fit every block of a cut model to the dense model's hidden states, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.blocks.streams import Stream, advance_stream, loaded, pass_block
from secateur.blocks.tasks import BlockTask
from secateur.methods.reconstruct import Reconstruct
from secateur.models.store import BlockStore
from secateur.models.structure import find_linears
from secateur.report.documents.training import FittedBlockReport


def bounded_error(y_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    """Squared distance of every token's hidden states over the larger of their squares, at most 4.

    Models have a few tokens whose hidden states are hundreds of times as large as others. A model
    that was cut may have them in other places, and relative to the small state that the dense
    model has there, their error would outweigh all other tokens.

    Args:
        y_BLD: hidden states (batch, length, hidden), with their graph.
        target_BLD: those of the dense model.

    Returns:
        error_BL.
    """
    error_BL = (y_BLD - target_BLD).square().sum(-1)
    power_BL = torch.maximum(target_BLD.square().sum(-1), y_BLD.detach().square().sum(-1))
    return error_BL / power_BL.clamp_min(torch.finfo(torch.float32).tiny)


def fit_blocks(
    store: BlockStore,
    dense: BlockStore,
    stream: Stream,
    dense_stream: Stream,
    stage: Reconstruct,
    seed: int,
) -> Iterator[FittedBlockReport]:
    """Train the blocks that the stream has not passed; each is saved before its report is yielded.

    A block sees what the fitted blocks before it hand on, and learns to return what the dense
    model has at that depth, so it makes up for errors made earlier. One block is in memory.

    Args:
        store: the cut model.
        dense: the model it was cut from, with as many blocks of the same hidden size.
        stream: hidden states of the cut model.
        dense_stream: those of the dense model on the same text.
        stage: how to train.
        seed: decides the order of the text.

    Raises:
        SecateurError: weights or hidden states are not finite.
    """
    for index in range(stream.position, len(store.blocks)):
        pass_block(dense, dense_stream)
        with loaded(store, index) as block:
            name = store.blocks.name(index)
            linears = tuple(find_linears(block))
            task = BlockTask(
                name=name,
                block=block,
                stored=store.weight_dtype(index),
                stream=stream,
                target_SLD=dense_stream.x_SLD,
                generator=torch.Generator().manual_seed(seed + index),
                # Nothing is removed inside a block that was cut.
                masks={
                    each.name: torch.ones_like(each.weight_OI, dtype=torch.bool) for each in linears
                },
                error=bounded_error,
            )
            before = after = task.held_out_error()
            # Nothing is left in a block that was removed as a whole.
            if linears:
                stage.apply(task)
                after = task.held_out_error()
            advance_stream(block, stream, [], name)
            store.save(index, None)
        yield FittedBlockReport(index=index, before=before, after=after, notes=task.notes)


def pass_fitted(
    store: BlockStore, dense: BlockStore, stream: Stream, dense_stream: Stream, count: int
) -> None:
    """Carry both streams through the blocks that an earlier session fitted."""
    for _ in range(count):
        pass_block(dense, dense_stream)
        pass_block(store, stream, finished=True)
