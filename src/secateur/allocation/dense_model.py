"""The dense model on a few calibration sequences, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.allocation.allocation import DenseBlock
from secateur.blocks.inputs import (
    InputAccumulator,
    LinearGroup,
    find_groups,
    visit_inputs,
)
from secateur.blocks.passes import RowSensitivity, random_projection
from secateur.blocks.precision import forward_precision
from secateur.blocks.streams import Batches, Stream, allocate, loaded_blocks
from secateur.blocks.tasks import InputStatistics
from secateur.models.capture import logits_after
from secateur.models.experts import unstacked_experts
from secateur.models.store import BlockStore
from secateur.models.structure import Linear
from secateur.runs.progress import Progress, silent


class DenseModel:
    """Passes over the dense model, for allocations to look at.

    Args:
        store: gives out the blocks; none is changed.
        tokens_SL: calibration tokens that may be fitted to, of which a few sequences are used.
        device: of forward passes.
        dtype: of forward passes.
        batch_tokens: tokens in one forward pass.
        seed: of random probes.
        folder: where mapped files may be put.
        memory: bytes that hidden states may take before they go to a mapped file.
        progress: called with (phase, done, total).
    """

    def __init__(
        self,
        store: BlockStore,
        tokens_SL: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_tokens: int,
        seed: int,
        folder: Path | None,
        memory: int,
        progress: Progress = silent,
    ) -> None:
        self._store = store
        self._tokens_SL = tokens_SL
        self._device = device
        self._dtype = dtype
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._folder = folder
        self._memory = memory
        self._progress = progress

    def blocks(self, sequences: int, probes: int = 0) -> Iterator[DenseBlock]:
        """Go through the blocks from first to last.

        Args:
            sequences: how many calibration sequences to use, at most.
            probes: random ±1 vectors per batch, from whose gradients the row sensitivities of
                the block's own output come; none if 0.
        """
        stream = self._stream(self._some(sequences))
        generator = torch.Generator().manual_seed(self._seed)
        count = len(self._store.blocks)
        for index, block in self._dense_blocks(range(count)):
            linears = self._store.blocks.linears(index)
            inputs = _input_statistics(linears, block, stream, self._device, self._dtype)
            gradients = RowSensitivity(linears if probes else [])
            for batch in stream.batches.all:
                for _ in range(probes):
                    gradients.add(partial(self._probe, block, stream, batch, generator))
            yield self._seen(index, linears, inputs, gradients)
            for batch in stream.batches.all:
                stream.advance(block, batch)
            stream.position += 1
            self._progress("Measuring blocks", index + 1, count)

    def blocks_under_loss(self, sequences: int) -> Iterator[DenseBlock]:
        """Go through the blocks from last to first, with row sensitivities of the final loss.

        The loss is that of the next token, summed over all tokens. Its gradient is carried back
        block by block: each block's inputs were kept on the way forward, and its forward pass is
        computed again, with a graph.

        Args:
            sequences: how many calibration sequences to use, at most.
        """
        tokens_SL = self._some(sequences)
        stream = self._stream(tokens_SL)
        count = len(self._store.blocks)
        x_KSLD = allocate((count, *stream.x_SLD.shape), self._folder, self._memory)
        inputs: list[dict[str, InputStatistics]] = []
        for index, block in self._dense_blocks(range(count)):
            linears = self._store.blocks.linears(index)
            inputs.append(_input_statistics(linears, block, stream, self._device, self._dtype))
            x_KSLD[index].copy_(stream.x_SLD)
            for batch in stream.batches.all:
                stream.advance(block, batch)
            stream.position += 1
            self._progress("Measuring blocks", index + 1, 2 * count)

        gradient_SLD = self._loss_gradient(tokens_SL, stream.x_SLD)
        for index, block in self._dense_blocks(reversed(range(count))):
            stream.position = index
            linears = self._store.blocks.linears(index)
            gradients = RowSensitivity(linears)
            for batch in stream.batches.all:
                x_BLD = x_KSLD[index][batch].to(self._device, copy=True).requires_grad_()
                outer_BLD = gradient_SLD[batch].to(self._device)
                gradients.add(partial(_product, stream, block, x_BLD, outer_BLD))
                assert x_BLD.grad is not None
                gradient_SLD[batch].copy_(x_BLD.grad)
            yield self._seen(index, linears, inputs[index], gradients)
            self._progress("Measuring blocks", 2 * count - index, 2 * count)

    def _some(self, sequences: int) -> Tensor:
        """Sequences spread evenly over all."""
        used = min(sequences, len(self._tokens_SL))
        return self._tokens_SL[torch.arange(used) * len(self._tokens_SL) // used]

    def _stream(self, tokens_SL: Tensor) -> Stream:
        count, length = tokens_SL.shape
        return Stream(
            self._store,
            tokens_SL,
            Batches.of(count, length, self._batch_tokens, fitted=count),
            self._device,
            self._dtype,
            self._folder,
            self._memory,
        )

    def _dense_blocks(self, indices: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Dense blocks with their experts as linears and no gradients of their weights."""
        for index, _, block in loaded_blocks(self._store, indices):
            wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
            try:
                for parameter in wanted:
                    parameter.requires_grad_(False)
                with unstacked_experts(block):
                    yield index, block
            finally:
                for parameter in wanted:
                    parameter.requires_grad_()

    def _seen(
        self,
        index: int,
        linears: Sequence[Linear],
        inputs: Mapping[str, InputStatistics],
        gradients: RowSensitivity,
    ) -> DenseBlock:
        roots = {name: sum_O.sqrt() for name, sum_O in gradients.sums.items()}
        return DenseBlock(index, self._store.blocks.name(index), linears, inputs, roots)

    def _probe(
        self, block: nn.Module, stream: Stream, batch: slice, generator: torch.Generator
    ) -> Tensor:
        x_BLD = stream.x_SLD[batch].to(self._device, copy=True).requires_grad_()
        return random_projection(stream.call(block, x_BLD), generator)

    def _loss_gradient(self, tokens_SL: Tensor, last_SLD: Tensor) -> Tensor:
        """Put the loss's gradient by the last block's output in that output's place."""
        with self._store.head():
            for row in range(len(tokens_SL)):
                ids = tokens_SL[row : row + 1].to(self._device, torch.long)
                x_BLD = last_SLD[row : row + 1].to(self._device, copy=True).requires_grad_()
                with torch.enable_grad(), forward_precision(self._dtype, self._device):
                    logits_BLV = logits_after(self._store.blocks, ids, x_BLD)
                    loss = cross_entropy(logits_BLV[0, :-1].float(), ids[0, 1:], reduction="sum")
                (gradient_BLD,) = torch.autograd.grad(loss, x_BLD)
                last_SLD[row].copy_(gradient_BLD[0])
        return last_SLD


def _product(stream: Stream, block: nn.Module, x_BLD: Tensor, outer_BLD: Tensor) -> Tensor:
    return (stream.call(block, x_BLD) * outer_BLD).sum()


def _input_statistics(
    linears: Sequence[Linear],
    block: nn.Module,
    stream: Stream,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, InputStatistics]:
    """Mean squares of every linear's inputs over all sequences of the stream."""
    groups: list[LinearGroup] = []
    sums: list[InputAccumulator] = []

    def add(group: int, x_NI: Tensor) -> None:
        sums[group].add(x_NI)

    for batch in stream.batches.all:
        forward = partial(stream.forward, block, batch)
        if not groups:
            groups = find_groups(linears, forward)
            widths = [group.linears[0].weight_OI.shape[1] for group in groups]
            sums = [InputAccumulator(width, "norms", device, dtype) for width in widths]
        visit_inputs(groups, forward, add)
    return {
        linear.name: each.result()
        for group, each in zip(groups, sums, strict=True)
        for linear in group.linears
    }
