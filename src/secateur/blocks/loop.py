"""Move a stream of hidden states past a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.blocks.replay import Replay
from secateur.blocks.streams import Stream
from secateur.runs.errors import SecateurError
from secateur.solvers.block_loss import state_error


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
