"""What a run will need, before it starts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from secateur.blocks.streams import memory_budget
from secateur.methods.stage import BlockStage, GroupStage
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import linear_shapes, unstacked_experts
from secateur.models.structure import BlockList, check_length
from secateur.pruning.job import check_saving
from secateur.pruning.recipe import Recipe
from secateur.pruning.walk import wants_dense_stream, wants_targets
from secateur.report.documents.prune import Estimate

_FLOAT = 4
# The interpreter with torch and transformers imported.
_LIBRARIES_BYTES = 700_000_000
# Forwards of a block for its statistics, in steps that are cut off where the last input is seen.
_STATISTICS_PASSES = 1.5
# Intermediate tensors of a forward that live at the same time, in units of the widest linear.
_LIVE_TENSORS = 6
# Copies of a group's weights a solver holds: dense, current, result, two temporaries.
_SOLVER_COPIES = 5
# The Gram matrix, its damped copy and its factor.
_GRAM_COPIES = 3


def estimate(
    model: str | Path, recipe: Recipe | None = None, *, trust_remote_code: bool = False
) -> Estimate:
    """Estimate peak memory and work of pruning ``model`` from its configuration and headers.

    Raises:
        SecateurError: the model or the recipe could not be pruned either.
    """
    recipe = recipe or Recipe()
    source = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    source = source.choosing(recipe.only, recipe.skip)
    reader, blocks = source.reader, source.blocks
    check_saving(recipe, source.blocks, source)
    check_length(blocks.model.config, recipe.calibration.length)
    plan = recipe.allocation.prepare(blocks, recipe.pattern)

    calibration = recipe.calibration
    tokens = calibration.samples * calibration.length
    hidden = source.hidden_size
    buffers = 1 + wants_dense_stream(recipe.stages) + wants_targets(recipe.stages)
    activations = buffers * tokens * hidden * _FLOAT
    mapped = activations > memory_budget(recipe.activation_memory)

    all_shapes = [_input_groups(blocks, index) for index in range(len(blocks))]
    group_stages = [stage for stage in recipe.stages if isinstance(stage, GroupStage)]
    block_stages = [stage for stage in recipe.stages if isinstance(stage, BlockStage)]
    needs_gram = any(stage.needs == "gram" for stage in group_stages)
    needs_statistics = any(stage.needs != "nothing" for stage in group_stages)
    block_bytes = max(sum(p.numel() for p in block.parameters()) for block in blocks) * _FLOAT
    batch = max(recipe.batch_tokens, calibration.length)
    working = 0
    for groups in all_shapes:
        for rows, width in groups:
            gram = _GRAM_COPIES * width * width if needs_gram else 0
            working = max(working, _SOLVER_COPIES * rows * width + gram)
        widest = max((max(rows, width) for rows, width in groups), default=0)
        working = max(working, _LIVE_TENSORS * batch * widest)
    files = source.tensors.outside.files
    outside = sum(math.prod(reader.shapes[name]) for name in files) * _FLOAT
    resident = 0 if mapped else activations
    # Block stages keep the dense weights beside what each of them needs while it works.
    copies = 1 + max(stage.copies for stage in block_stages) if block_stages else 0
    # The embeddings have left when the first block arrives.
    block_work = max(working * _FLOAT, (copies + 1) * block_bytes)
    stages = max(outside, 2 * block_bytes + block_work + activations // (4 * buffers))
    fitted = recipe.fitted_windows / calibration.samples
    # The advance on all of the text, and the dense outputs on what is held out.
    passes = 1 + (1 - fitted)
    passes += fitted * _STATISTICS_PASSES if needs_statistics else 0
    passes += wants_dense_stream(recipe.stages) + (fitted if wants_targets(recipe.stages) else 0)
    passes += fitted * sum(stage.passes(recipe.fitted_windows) for stage in block_stages)
    passes += recipe.allocation.passes(calibration.samples)

    squares = sum(width * width for groups in all_shapes for _, width in groups)
    return Estimate(
        model=str(model),
        streamed=True,
        blocks=len(blocks),
        weights=sum(plan.weights.values()),
        zeros=sum(plan.zeros.values()),
        left_dense=len(linear_shapes(replace(blocks, chosen=None))) - len(plan.weights),
        peak_memory_bytes=_LIBRARIES_BYTES + resident + stages,
        activation_bytes=activations,
        activations_in="a mapped file" if mapped else "memory",
        forward_flops=2.0 * tokens * sum(plan.weights.values()) * passes,
        statistics_flops=1.5 * tokens * squares if needs_gram else 0.0,
        output_bytes=source.saved_bytes(recipe.weight_format, plan.zeros),
    )


def _input_groups(blocks: BlockList, index: int) -> list[tuple[int, int]]:
    """(rows, width) of linears that probably share an input: siblings of the same width."""
    groups: dict[tuple[str, int], int] = {}
    with unstacked_experts(blocks[index]):
        for linear in blocks.linears(index):
            rows, width = linear.weight_OI.shape
            key = (linear.name.rpartition(".")[0], width)
            groups[key] = groups.get(key, 0) + rows
    return [(rows, width) for (_, width), rows in groups.items()]
