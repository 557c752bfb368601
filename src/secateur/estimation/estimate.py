"""What a run will need, before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from secateur.allocation.plan import GivenPlan
from secateur.allocation.uniform import Uniform
from secateur.blocks.streams import memory_budget
from secateur.estimation.trial import Trial, peak_of, resident
from secateur.methods.magnitude import Magnitude
from secateur.methods.stage import BlockStage, GroupStage
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import linear_shapes, unstacked_experts
from secateur.models.headers import headers_of
from secateur.models.structure import BlockList, check_length
from secateur.pruning.job import check_saving
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.pruning.walk import wants_dense_stream, wants_targets
from secateur.report.documents.prune import Estimate
from secateur.runs.device import DtypeName, resolve_device, resolve_dtype
from secateur.text.calibration import samples_to_write
from secateur.text.generation import writing_bytes
from secateur.text.options import CalibrationOptions
from secateur.text.sources import SELF

_FLOAT = 4
# Forwards of a block for its statistics, in steps that are cut off where the last input is seen.
_STATISTICS_PASSES = 1.5
# Blocks that show all that one block in memory needs, and what the next one adds.
_DEPTH = 2


def estimate(
    model: str | Path, recipe: Recipe | None = None, *, trust_remote_code: bool = False
) -> Estimate:
    """Estimate peak memory and work of pruning ``model`` from its configuration and headers.

    Raises:
        SecateurError: the model or the recipe could not be pruned either.
    """
    recipe = recipe or Recipe()
    with headers_of(model) as folder:
        source = Checkpoint.open(
            folder, trust_remote_code=trust_remote_code, save_dtype=recipe.save_dtype
        )
        return _estimate(str(model), source.choosing(recipe.only, recipe.skip), recipe)


def _estimate(model: str, source: Checkpoint, recipe: Recipe) -> Estimate:
    blocks = source.blocks
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
    fitted = recipe.fitted_windows / calibration.samples
    # The advance on all of the text, and the dense outputs on what is held out.
    passes = 1 + (1 - fitted)
    passes += fitted * _STATISTICS_PASSES if needs_statistics else 0
    passes += wants_dense_stream(recipe.stages) + (fitted if wants_targets(recipe.stages) else 0)
    passes += fitted * sum(stage.passes(recipe.fitted_windows) for stage in block_stages)
    passes += recipe.allocation.passes(calibration.samples)

    squares = sum(width * width for groups in all_shapes for _, width in groups)
    return Estimate(
        model=model,
        streamed=True,
        blocks=len(blocks),
        weights=sum(plan.weights.values()),
        zeros=sum(plan.zeros.values()),
        left_dense=len(linear_shapes(replace(blocks, chosen=None))) - len(plan.weights),
        peak_memory_bytes=pruning_peak(source, recipe),
        activation_bytes=activations,
        activations_in="a mapped file" if mapped else "memory",
        forward_flops=2.0 * tokens * sum(plan.weights.values()) * passes,
        statistics_flops=1.5 * tokens * squares if needs_gram else 0.0,
        output_bytes=source.saved_bytes(recipe.weight_format, plan.zeros),
    )


def pruning_peak(source: Checkpoint, recipe: Recipe) -> int:
    """Peak of resident memory of ``prune``, bytes."""
    calibration = recipe.calibration
    options = recipe.model_dump(
        mode="json", exclude={"stages", "only", "skip", "activation_memory"}
    )

    def run(trial: Trial) -> None:
        stages = [stage.scaled(trial.divisor) for stage in recipe.stages]
        # The miniature has neither a plan's linears nor masks to keep.
        if isinstance(recipe.allocation, GivenPlan):
            options["allocation"] = Uniform().model_dump()
        if recipe.keeps_masks:
            options["pattern"], stages[0] = "0.5", Magnitude()
        small = Recipe.from_mapping(
            {
                **options,
                "stages": [stage.model_dump(mode="json") for stage in stages],
                "calibration": {
                    "source": str(trial.text),
                    "samples": calibration.samples,
                    "length": trial.length(calibration.length),
                },
                "batch_tokens": trial.length(max(recipe.batch_tokens, calibration.length)),
            }
        )
        prune(trial.model, small, trial.output)

    before = resident()
    tokens = calibration.samples * calibration.length
    peak = peak_of(source, run, tokens=tokens, depth=_DEPTH)
    return max(peak, before + text_bytes(source, calibration, recipe.dtype, recipe.device))


def text_bytes(
    source: Checkpoint, calibration: CalibrationOptions, dtype: DtypeName, device: str
) -> int:
    """What writing calibration text takes, if the model does that."""
    samples = calibration.shares.get(SELF, 0)
    if samples == 0:
        return 0
    loaded = resolve_dtype(dtype, resolve_device(device))
    written = samples_to_write(samples)
    return writing_bytes(source.blocks.model, loaded, written, calibration.length)


def _input_groups(blocks: BlockList, index: int) -> list[tuple[int, int]]:
    """(rows, width) of linears that probably share an input: siblings of the same width."""
    groups: dict[tuple[str, int], int] = {}
    with unstacked_experts(blocks[index]):
        for linear in blocks.linears(index):
            rows, width = linear.weight_OI.shape
            key = (linear.name.rpartition(".")[0], width)
            groups[key] = groups.get(key, 0) + rows
    return [(rows, width) for (_, width), rows in groups.items()]
