"""Walk through the blocks of a model and prune one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.blocks.inputs import (
    InputAccumulator,
    LinearGroup,
    find_groups,
    judged_tokens,
    observed_inputs,
)
from secateur.blocks.replay import Replay
from secateur.blocks.streams import Stream, advance_stream, loaded
from secateur.blocks.tasks import BlockTask, DenseTask, Quantization, Reference
from secateur.methods.quantize import Quantize
from secateur.methods.stage import BlockStage, DenseStage, GroupStage, Stage
from secateur.models.experts import unstacked_experts
from secateur.models.masks import KeptMasks
from secateur.models.store import BlockStore
from secateur.models.structure import Linear, find_linears
from secateur.patterns.pattern import Pattern
from secateur.patterns.plan import Plan
from secateur.pruning.groups import GroupPruner
from secateur.pruning.pruned import OpenBlock, PrunedBlock, zeros_of
from secateur.runs.meter import Stopwatch

# Tokens that suffice to tell how large the inputs of a linear are.
_NORM_TOKENS = 8192


@dataclass(frozen=True)
class BlockTargets:
    """What the dense block returns, before anything in it changes.

    Attributes:
        groups: its linears by shared input, in the order of execution.
        held_out: its outputs on held-out text of the pruned stream, by batch.
        outputs: what block stages fit to, by reference (sequences, length, hidden).
        mean_squares: mean squared inputs of each linear by column, if a stage asks for them.
    """

    groups: list[LinearGroup]
    held_out: list[Tensor]
    outputs: Mapping[Reference, Tensor]
    mean_squares: dict[str, Tensor]


class BlockPruner:
    """Applies the stages of a recipe to one block after the other.

    Args:
        stages: in order.
        pattern: what masks must look like.
        device: where blocks are worked on.
        dtype: of forward passes.
        seed: for the random choices of stages.
        buffer_SLD: room for the outputs that `wants_targets` says are needed.
        masks: those to begin with.
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        pattern: Pattern,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        buffer_SLD: Tensor | None = None,
        masks: KeptMasks | None = None,
    ) -> None:
        stages = list(stages)
        self._dense_stages = [stage for stage in stages if isinstance(stage, DenseStage)]
        pruning = [stage for stage in stages if not isinstance(stage, DenseStage)]
        self._phases: list[BlockStage | GroupPruner] = []
        self._block_stages: list[BlockStage] = []
        for _, run in itertools.groupby(stages, key=lambda stage: isinstance(stage, BlockStage)):
            adjacent = list(run)
            together = [stage for stage in adjacent if isinstance(stage, GroupStage)]
            alone = [stage for stage in adjacent if isinstance(stage, BlockStage)]
            if together:
                dense = len(pruning) == 1 and together[0].wants_dense_inputs(pattern)
                self._phases.append(
                    GroupPruner(together, pattern, device, dtype, dense_inputs=dense)
                )
            self._phases += alone
            self._block_stages += alone
        self._pattern = pattern
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self._buffer_SLD = buffer_SLD
        self._masks = masks
        self._quantize = next((stage for stage in stages if isinstance(stage, Quantize)), None)

    def look(
        self,
        block: nn.Module,
        linears: Sequence[Linear],
        stream: Stream,
        dense_stream: Stream | None,
    ) -> BlockTargets:
        """Run the dense block, before anything in it changes.

        Args:
            block: with its dense weights.
            linears: those of the block that are worked on.
            stream: whose position is the block.
            dense_stream: that of the dense model, if there is one; it moves past the block.
        """
        held_out: list[Tensor] = []
        run = partial(stream.forward, block)
        first = stream.batches.held_out[0]
        groups = find_groups(linears, lambda: held_out.append(run(first).cpu()))
        held_out += [run(batch).cpu() for batch in stream.batches.held_out[1:]]
        mean_squares = self._pass_fitted(block, stream, groups)
        outputs: dict[Reference, Tensor] = {}
        if self._buffer_SLD is not None:
            for batch, y_BLD in zip(stream.batches.held_out, held_out, strict=True):
                self._buffer_SLD[batch].copy_(y_BLD)
            outputs["pruned"] = self._buffer_SLD
        if dense_stream is not None:
            for batch in dense_stream.batches.all:
                dense_stream.advance(block, batch)
            dense_stream.position += 1
            outputs["dense"] = dense_stream.x_SLD
        return BlockTargets(groups, held_out, outputs, mean_squares)

    def _pass_fitted(
        self, block: nn.Module, stream: Stream, groups: Sequence[LinearGroup]
    ) -> dict[str, Tensor]:
        """Run the fitted sequences once, for the outputs and input norms that stages ask for."""
        if not (self._dense_stages or any(stage.needs_norms for stage in self._block_stages)):
            groups = []
        if not groups and self._buffer_SLD is None:
            return {}
        widths = [group.linears[0].weight_OI.shape[1] for group in groups]
        sums = [InputAccumulator(width, "norms", self._device, self._dtype) for width in widths]
        with observed_inputs(groups, lambda number, x_NI: sums[number].add(x_NI)):
            for batch in stream.batches.fitted:
                if self._buffer_SLD is None and sums[0].tokens >= _NORM_TOKENS:
                    break
                y_BLD = stream.forward(block, batch)
                if self._buffer_SLD is not None:
                    self._buffer_SLD[batch].copy_(y_BLD)
        return {
            linear.name: total.result().mean_square_I
            for group, total in zip(groups, sums, strict=True)
            for linear in group.linears
        }

    def prune(self, work: OpenBlock, targets: BlockTargets) -> None:
        """Apply all stages to the block.

        Args:
            work: the block with its dense weights; they are replaced.
            targets: what `look` saw.
        """
        pruned, stream = work.pruned, work.stream
        if self._masks is not None:
            masks = self._masks.of(stream.position, work.block) or {}
            names = {linear.name for linear in work.linears}
            pruned.masks.update((name, mask) for name, mask in masks.items() if name in names)
        watch = Stopwatch(pruned.seconds, self._device)
        generator = torch.Generator().manual_seed(self._seed + stream.position)
        for stage in self._dense_stages:
            stage.apply(
                DenseTask(
                    block=work.block,
                    groups=[group.linears for group in targets.groups],
                    pattern=self._pattern,
                    mean_squares=targets.mean_squares,
                    run=partial(stream.exact, work.block, slice(0, stage.batch_sequences)),
                    generator=generator,
                    notes=pruned.notes,
                )
            )
            watch.lap(stage.method)
        # The first weights that count as dense are those in their final order.
        if self._block_stages:
            work.dense = {linear.name: linear.weight_OI.clone() for linear in work.linears}
        for phase in self._phases:
            work.replay.forget()
            if isinstance(phase, GroupPruner):
                phase.prune(work, targets.groups, watch)
                continue
            assert work.dense is not None
            phase.apply(
                BlockTask(
                    name=work.name,
                    block=work.block,
                    dense=work.dense,
                    masks=pruned.masks,
                    zeros=work.zeros,
                    chosen=[linear.name for linear in work.linears],
                    pattern=self._pattern,
                    stored=work.stored,
                    mean_squares=targets.mean_squares,
                    stream=stream,
                    target_SLD=targets.outputs[phase.reference],
                    generator=generator,
                    quantization=None
                    if self._quantize is None
                    else Quantization(
                        self._quantize.grid,
                        self._quantize.solver == "round",
                        pruned.clippings,
                        pruned.quantised,
                    ),
                    notes=pruned.notes,
                    rejected=pruned.rejected,
                )
            )
            watch.lap(phase.method)
        if work.dense is not None and isinstance(self._phases[-1], BlockStage):
            pruned.errors = linear_errors(work, targets.groups, work.dense)


def linear_errors(
    work: OpenBlock, groups: list[LinearGroup], dense: Mapping[str, Tensor]
) -> dict[str, float]:
    """Relative squared output error of each linear on tokens of the first held-out batch.

    Both versions of a linear get the input that the pruned block gives it.
    """
    errors = {linear.name: float("nan") for linear in work.linears}

    def measure(number: int, x_NI: Tensor) -> None:
        for linear in groups[number].linears:
            with torch.autocast(x_NI.device.type, enabled=False):
                x, w_OI = judged_tokens(x_NI).float(), dense[linear.name]
                error = (x @ (linear.weight_OI - w_OI).T).square().sum()
                power = (x @ w_OI.T).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
            errors[linear.name] = float(error / power)

    with observed_inputs(groups, measure):
        work.stream.forward(work.block, work.stream.batches.held_out[0])
    return errors


def wants_targets(stages: Iterable[Stage]) -> bool:
    """Whether a stage fits to the dense block's output on the pruned stream."""
    return any(isinstance(s, BlockStage) and s.reference == "pruned" for s in stages)


def wants_dense_stream(stages: Iterable[Stage]) -> bool:
    """Whether a stage fits to the hidden states of the dense model."""
    return any(isinstance(s, BlockStage) and s.reference == "dense" for s in stages)


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
        with unstacked_experts(block):
            linears = tuple(store.blocks.linears(index))
            pruned = PrunedBlock(index, zeros_before=zeros_of(find_linears(block)))
            with Replay(block, [linear.name for linear in linears]) as replay:
                targets = pruner.look(block, linears, stream, dense_stream)
                watch.lap("dense outputs")
                stored = store.weight_dtype(index)
                work = OpenBlock(name, block, linears, stream, zeros, stored, replay, pruned)
                if linears:
                    pruner.prune(work, targets)
                watch = Stopwatch(seconds, device)
                pruned.held_out_error = advance_stream(
                    block, stream, targets.held_out, name, replay
                )
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
        name = store.blocks.name(index)
        # As in the walk itself: stacked experts would round their sums in another order.
        if dense_stream is not None:
            with loaded(store, index) as block, unstacked_experts(block):
                advance_stream(block, dense_stream, [], name)
        with loaded(store, index, finished=True) as block, unstacked_experts(block):
            advance_stream(block, stream, [], name)
        yield index
