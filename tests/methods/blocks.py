"""Single blocks of tiny models, as a walk hands them to a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from secateur.blocks.inputs import InputAccumulator, find_groups, observed_inputs
from secateur.blocks.streams import Batches, Stream
from secateur.blocks.tasks import BlockTask
from secateur.models.experts import linear_shapes, unstacked_experts
from secateur.models.resident import ResidentStore
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks
from secateur.patterns.pattern import Pattern, Unstructured
from secateur.patterns.plan import uniform_plan

CPU = torch.device("cpu")
SPARSITY = 0.43


@contextmanager
def block_task(
    folder: Path,
    stored: torch.dtype = torch.float32,
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[BlockTask]:
    """The first block of a tiny model, dense, with what a walk would know about it."""
    pattern = pattern or Unstructured(SPARSITY)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with unstacked_experts(find_blocks(model)[0]):
        yield _task(ResidentStore(find_blocks(model), None, CPU), stored, pattern, dtype)


def _task(
    store: ResidentStore, stored: torch.dtype, pattern: Pattern, dtype: torch.dtype
) -> BlockTask:
    ids = torch.randint(4, 200, (16, 24), generator=torch.Generator().manual_seed(1))
    stream = Stream(store, ids, Batches.of(16, 24, 96), CPU, dtype, None, 10**9, sizes=(1, 2, 4))
    block = store.load(0)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    linears = tuple(find_linears(block))
    target_SLD = torch.cat([stream.forward(block, batch) for batch in stream.batches.all])
    groups = find_groups(linears, lambda: stream.forward(block, stream.batches.all[0]))
    sums = [InputAccumulator(g.linears[0].weight_OI.shape[1], "norms", CPU, dtype) for g in groups]
    with observed_inputs(groups, lambda number, x_NI: sums[number].add(x_NI)):
        for batch in stream.batches.fitted:
            stream.forward(block, batch)
    prefix = f"{store.blocks.name(0)}."
    plan = uniform_plan(linear_shapes(store.blocks), pattern)
    return BlockTask(
        name="block",
        block=block,
        stored=stored,
        stream=stream,
        target_SLD=target_SLD,
        generator=torch.Generator().manual_seed(0),
        pattern=pattern,
        zeros={
            name.removeprefix(prefix): zeros
            for name, zeros in plan.zeros.items()
            if name.startswith(prefix)
        },
        dense={linear.name: linear.weight_OI.clone() for linear in linears},
        mean_squares={
            linear.name: sums[number].result().mean_square_I
            for number, group in enumerate(groups)
            for linear in group.linears
        },
    )
