"""Batches of calibration sequences, and the stream of hidden states that runs through them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from secateur.blocks.precision import forward_precision
from secateur.blocks.replay import Replay
from secateur.models.capture import BlockCall, capture, same_calls
from secateur.models.store import BlockStore
from secateur.runs.errors import SecateurError
from secateur.runs.files import writing
from secateur.runs.limits import tokens_at_once
from secateur.solvers.block_loss import state_error
from secateur.text.options import fitted_share

# Enough held-out tokens to tell a better block from a worse one, in a small part of a stage's time.
_JUDGED_TOKENS = 4096


@dataclass(frozen=True)
class Batches:
    """How sequences are grouped; fitted and held-out ones never share a batch.

    Attributes:
        fitted: batches that statistics come from.
        held_out: batches that errors are measured on.
        judged: those of them that decide between two versions of a block.
    """

    fitted: list[slice]
    held_out: list[slice]
    judged: list[slice]

    @classmethod
    def of(
        cls, sequences: int, length: int, batch_tokens: int, fitted: int | None = None
    ) -> Batches:
        """Cut ``sequences`` of ``length`` tokens into batches of about ``batch_tokens``.

        The first ``fitted`` are fitted to, ``fitted_share`` of them if not given.
        """
        boundary = fitted_share(sequences) if fitted is None else fitted
        size = max(1, batch_tokens // length)
        judged = tokens_at_once(_JUDGED_TOKENS)
        held_out = [slice(i, min(i + size, sequences)) for i in range(boundary, sequences, size)]
        return cls(
            [slice(i, min(i + size, boundary)) for i in range(0, boundary, size)],
            held_out,
            [batch for batch in held_out if (batch.start - boundary) * length < judged],
        )

    @property
    def boundary(self) -> int:
        """Number of fitted sequences; the held-out ones come after them."""
        boundary: int = self.fitted[-1].stop
        return boundary

    @property
    def all(self) -> list[slice]:
        """All batches in order."""
        return self.fitted + self.held_out


class Stream:
    """Hidden states of every calibration sequence on their way through the blocks.

    Attributes:
        x_SLD: hidden states (sequences, length, hidden), fp32, on the CPU or mapped from a file.
        batches: how the sequences are grouped.
        position: index of the block that the hidden states enter next.
        device: where blocks run.
        dtype: of forward passes.
    """

    def __init__(
        self,
        store: BlockStore,
        token_ids: Tensor,
        batches: Batches,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path | None,
        memory: int,
        sizes: Collection[int] = (),
    ) -> None:
        """Embed the tokens.

        Args:
            store: the model.
            token_ids: (sequences, length).
            batches: how they are grouped.
            device: where blocks run.
            dtype: of forward passes.
            folder: where a mapped file may be put.
            memory: bytes that the hidden states may take in memory.
            sizes: further numbers of sequences that blocks will be called on.
        """
        self.batches = batches
        self.position = 0
        self.device = device
        self.dtype = dtype
        self._calls: dict[int, list[BlockCall]] = {}
        with store.embeddings(), torch.no_grad():
            self.x_SLD = self._embed(store, token_ids, folder, memory)
            for size in set(sizes) - self._calls.keys():
                ids = token_ids[:size].to(self.device, torch.long)
                with forward_precision(self.dtype, self.device):
                    self._calls[len(ids)] = capture(store.blocks, ids).calls

    def twin(self, folder: Path | None, memory: int) -> Stream:
        """A second stream that starts at the same hidden states and moves independently.

        It has the fitted sequences and the judged ones, not the other held-out ones.
        """
        twin = copy(self)
        judged = self.batches.judged
        twin.batches = Batches(self.batches.fitted, judged, judged)
        length, width = self.x_SLD.shape[1:]
        twin.x_SLD = allocate((judged[-1].stop, length, width), folder, memory)
        twin.x_SLD.copy_(self.x_SLD[: len(twin.x_SLD)])
        return twin

    @property
    def fitted(self) -> int:
        """Number of fitted sequences; the held-out ones come after them."""
        return self.batches.boundary

    @property
    def judged(self) -> list[slice]:
        """Batches that decide between two versions of a block."""
        return self.batches.judged

    def _embed(
        self, store: BlockStore, token_ids: Tensor, folder: Path | None, memory: int
    ) -> Tensor:
        x_SLD: Tensor | None = None
        compared = False
        for batch in self.batches.all:
            ids = token_ids[batch].to(self.device, torch.long)
            known = self._calls.get(len(ids))
            # One repetition of a batch size is enough to see whether calls depend on the text.
            whole = known is None or not compared
            with forward_precision(self.dtype, self.device):
                captured = capture(store.blocks, ids, last=None if whole else 0)
            if known is None:
                self._calls[len(ids)] = captured.calls
            elif not compared:
                compared = True
                if not same_calls(known, captured.calls):
                    raise SecateurError(
                        f"{type(store.blocks.model).__name__} gives its blocks inputs that depend "
                        "on the text beside the hidden states; this family is not supported."
                    )
            first_BLD = captured.first_BLD.float()
            if x_SLD is None:
                x_SLD = allocate((len(token_ids), *first_BLD.shape[1:]), folder, memory)
            x_SLD[batch].copy_(first_BLD)
        assert x_SLD is not None
        return x_SLD

    def forward(self, block: nn.Module, batch: slice, replay: Replay | None = None) -> Tensor:
        """Return the next block's output (batch, length, hidden), fp32, on its device."""
        if replay is not None:
            replay.at(batch)
        with torch.no_grad():
            return self.call(block, self.x_SLD[batch].to(self.device))

    def exact(self, block: nn.Module, batch: slice) -> Tensor:
        """Return the next block's output with all its products in fp32."""
        with torch.no_grad():
            x_BLD = self.x_SLD[batch].to(self.device)
            return self._calls[len(x_BLD)][self.position](block, x_BLD).float()

    def call(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        """Return the next block's output on hidden states of one batch, with its graph, fp32."""
        with self.precision():
            return self._calls[len(x_BLD)][self.position](block, x_BLD).float()

    def precision(self) -> AbstractContextManager[object]:
        """Context that blocks run in: matrix products in the dtype of forward passes."""
        return forward_precision(self.dtype, self.device)

    def advance(self, block: nn.Module, batch: slice, replay: Replay | None = None) -> Tensor:
        """Replace a batch's hidden states by the block's output on them, and return it."""
        y_BLD = self.forward(block, batch, replay)
        self.x_SLD[batch].copy_(y_BLD)
        return y_BLD


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


def memory_budget(gigabytes: float | None) -> int:
    """Bytes that streams may take in memory: as asked for, or half of what is free if None."""
    if gigabytes is None:
        return psutil.virtual_memory().available // 2
    return int(gigabytes * 1e9)


def allocate(
    shape: tuple[int, ...],
    folder: Path | None,
    budget: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return an uninitialised CPU tensor for a stream of activations.

    Args:
        shape: (sequences, length, hidden).
        folder: where a mapped file may be put; the system's temporary folder if None.
        budget: bytes the stream may take in memory; beyond them it is a mapped file.
        dtype: of its numbers.
    """
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= budget:
        return torch.empty(shape, dtype=dtype)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-", delete=True) as file,
        writing(Path(file.name)),
    ):
        # If the space were not reserved, a full disk would end the process at some later write.
        _reserve(file.fileno(), size * dtype.itemsize)
        # The name goes when the context ends and the mapping keeps the bytes, so a killed run
        # leaves no file behind.
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
