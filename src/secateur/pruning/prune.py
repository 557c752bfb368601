"""Prune a model: from a name and a recipe to a checkpoint and a report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.allocation.dense_model import DenseModel
from secateur.blocks.streams import Batches, Stream, allocate, memory_budget
from secateur.methods.stage import GroupStage
from secateur.models.experts import linear_shapes
from secateur.models.inspection import inspect
from secateur.models.origin import read_origin
from secateur.models.streamed import StreamedStore
from secateur.patterns.plan import Plan
from secateur.pruning.job import Inputs, Job
from secateur.pruning.notes import notes_on_run
from secateur.pruning.pruned import describe_block
from secateur.pruning.recipe import Recipe
from secateur.pruning.walk import (
    BlockPruner,
    pass_finished,
    walk,
    wants_dense_stream,
    wants_targets,
)
from secateur.report.documents.prune import BlockReport, Report, SparsityReport
from secateur.report.page import write_report
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text
from secateur.runs.meter import Meter
from secateur.runs.progress import Progress, silent
from secateur.runs.run import Run, check_apart
from secateur.text.saved import read_first


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` returns.

    Attributes:
        report: what was done and what it cost.
        output: the checkpoint folder, if one was asked for.
        model: the pruned model, if one was given in memory.
        masks: masks by full linear name, True = kept, if a model was given in memory.
    """

    report: Report
    output: Path | None
    model: PreTrainedModel | None
    masks: dict[str, Tensor]


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> PruneResult:
    """Prune a checkpoint block by block, or a model that is already in memory.

    Args:
        model: a checkpoint folder, hub id or GGUF file, of which one block at a time is read; or
            a model in memory, which is pruned in place.
        recipe: what to do; Wanda and refit to half the weights if None.
        output: a new or empty folder for the result, or that of an interrupted run to go on
            with. Required for a checkpoint, optional for a model in memory.
        tokenizer: for calibration text; the checkpoint's own if None.
        restart: start over in the folder of an earlier run.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible.
    """
    recipe = recipe or Recipe()
    target = None if output is None else Path(output).expanduser()
    if isinstance(model, PreTrainedModel):
        return _prune_in_memory(model, Inputs.of_model(model, recipe, tokenizer), target, progress)
    if target is None:
        raise SecateurError("Pruning a checkpoint needs an output folder; name a new or empty one.")
    check_apart(target, model)
    earlier = Run.look(target, restart=restart)
    inputs = Inputs.of_checkpoint(model, recipe, tokenizer, trust_remote_code, progress)
    inputs.check_space(target)
    first = read_first(earlier, partial(inputs.read_text, progress))
    with Run.take(target, inputs.fingerprint(), restart=restart) as run:
        report = run.live(
            Report,
            lambda: _execute(inputs.open(run, first), progress)[0],
            page=write_report,
            temporary=("blocks",),
        )
    return PruneResult(report, target, None, {})


def _prune_in_memory(
    model: PreTrainedModel, inputs: Inputs, target: Path | None, progress: Progress
) -> PruneResult:
    if target is None:
        report, found = _execute(inputs.open(None), progress)
        return PruneResult(report, None, model, found)
    masks: dict[str, Tensor] = {}

    def work() -> Report:
        report, found = _execute(inputs.open(run), progress)
        masks.update(found)
        inputs.encoder.tokenizer.save_pretrained(run.output)
        return report

    # Weights in memory have no fingerprint that is worth its time, so such a run starts afresh.
    with Run.take(target, {"model": str(time.time_ns())}, restart=False) as run:
        report = run.live(Report, work, page=write_report, temporary=("blocks",))
    return PruneResult(report, target, model, masks)


def plan(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Divide the zeros among the linears as a run of ``prune`` would, and change nothing.

    Args:
        model: as for ``prune``.
        recipe: pattern, allocation and calibration decide; stages do not.
        tokenizer: for calibration text; the checkpoint's own if None.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible.
    """
    recipe = recipe or Recipe()
    if isinstance(model, PreTrainedModel):
        inputs = Inputs.of_model(model, recipe, tokenizer)
    else:
        inputs = Inputs.of_checkpoint(model, recipe, tokenizer, trust_remote_code, progress)
    first = inputs.read_text(progress) if recipe.allocation.measures else None
    job = inputs.open(None, first)
    if recipe.allocation.measures:
        divided = _allocate(job, job.calibrate(progress).tokens, progress)
    else:
        divided = recipe.allocation.allocate(job.plan, job.store.blocks, None)
    shapes = linear_shapes(replace(job.store.blocks, chosen=None))
    left = [math.prod(shape) for name, shape in shapes.items() if name not in divided.weights]
    return replace(divided, left=len(left), left_weights=sum(left))


def _execute(job: Job, progress: Progress) -> tuple[Report, dict[str, Tensor]]:
    """Walk all blocks that are not finished, then write what makes them a checkpoint."""
    inputs, run, store, folder = job.inputs, job.run, job.store, job.folder
    recipe, device, dtype = inputs.recipe, inputs.device, inputs.dtype
    meter = Meter(device)
    calibration = job.calibrate(progress)
    meter.lap("calibration text")

    tokens_SL = calibration.tokens
    plan = _allocate(job, tokens_SL, progress)
    meter.lap("allocation")
    # The stream, that of the dense model and the outputs to fit to are of the same size.
    buffers = 1 + wants_dense_stream(recipe.stages) + wants_targets(recipe.stages)
    memory = memory_budget(recipe.activation_memory) // buffers
    stream = Stream(
        store,
        tokens_SL,
        Batches.of(len(tokens_SL), tokens_SL.shape[1], recipe.batch_tokens, recipe.fitted_windows),
        device,
        dtype,
        folder=folder,
        memory=memory,
        sizes={
            stage.step_size(recipe.fitted_windows)
            for stage in recipe.stages
            if not isinstance(stage, GroupStage)
        },
    )
    dense_stream = stream.twin(folder, memory) if wants_dense_stream(recipe.stages) else None
    targets_SLD = (
        allocate(tuple(stream.x_SLD.shape), folder, memory)
        if wants_targets(recipe.stages)
        else None
    )
    finished = [BlockReport.model_validate(saved) for saved in (run.finished if run else [])]
    resumed, count = len(finished), len(store.blocks)
    for index in pass_finished(store, stream, dense_stream, resumed):
        progress("Passing finished blocks", index + 1, resumed)
    meter.lap("start")

    masks: dict[str, Tensor] = {}
    pruner = BlockPruner(
        recipe.stages,
        recipe.pattern,
        device,
        dtype,
        seed=recipe.calibration.seed,
        buffer_SLD=targets_SLD,
        masks=job.kept,
    )
    progress("Pruning blocks", resumed, count)
    for pruned in walk(store, stream, dense_stream, plan, pruner, device):
        finished.append(describe_block(pruned))
        if inputs.source is None:
            prefix = store.blocks.name(pruned.index)
            masks |= {f"{prefix}.{name}": mask for name, mask in pruned.masks.items()}
        if run is not None:
            run.record(finished[-1].model_dump(mode="json"), store.written(pruned.index))
        progress("Pruning blocks", pruned.index + 1, count)
    meter.lap("blocks")

    store.finish()
    sparsity = _count_zeros(job, plan, masks, finished)
    meter.lap("checkpoint")
    if run is not None:
        write_text(run.folder / "recipe.yaml", recipe.to_yaml())
        plan.write(run.output / "plan.json")
    report = Report(
        model=inputs.name,
        origin=read_origin(inputs.name, None if inputs.source is None else inputs.source.folder),
        recipe=recipe.model_dump(mode="json"),
        calibration=calibration.description,
        forward_dtype=str(dtype).removeprefix("torch."),
        streamed=isinstance(store, StreamedStore),
        sparsity=sparsity,
        blocks=finished,
        resumed_blocks=resumed,
        notes=notes_on_run(recipe, linear_shapes(store.blocks), finished),
        **meter.costs(),
    )
    return report, masks


def _allocate(job: Job, tokens_SL: Tensor, progress: Progress) -> Plan:
    """Return the run's plan; what an earlier session of the run decided is used again."""
    inputs, run, store = job.inputs, job.run, job.store
    recipe = inputs.recipe
    saved = None if run is None else run.folder / "plan.json"
    if run is not None and saved is not None and run.has(saved):
        plan = Plan.from_file(saved)
        plan.check_fits(linear_shapes(store.blocks))
        return plan
    dense = None
    if recipe.allocation.measures:
        dense = DenseModel(
            store,
            tokens_SL[: recipe.fitted_windows],
            inputs.device,
            inputs.dtype,
            batch_tokens=recipe.batch_tokens,
            seed=recipe.calibration.seed,
            folder=job.folder,
            memory=memory_budget(recipe.activation_memory),
            progress=progress,
        )
    plan = recipe.allocation.allocate(job.plan, store.blocks, dense)
    if run is not None and saved is not None:
        plan.write(saved)
        run.keep([saved])
    return plan


def _count_zeros(
    job: Job, plan: Plan, masks: dict[str, Tensor], blocks: Sequence[BlockReport]
) -> SparsityReport:
    """Count zeros in the files, where there are any, and hold them against the plan."""
    planned, weights = sum(plan.zeros.values()), sum(plan.weights.values())
    rounded = sum(each.rounded_to_zero for block in blocks for each in block.linears.values())
    left = [each for block in blocks for each in block.left.values()]
    left_zeros, left_weights = sum(each.zeros for each in left), sum(each.weights for each in left)
    if job.run is None:
        zeros = sum(int((~mask).sum()) for mask in masks.values()) + rounded
    else:
        counted = inspect(job.run.output, trust_remote_code=job.inputs.trust_remote_code)
        zeros = counted.zeros - left_zeros
        if counted.weights != weights + left_weights:
            raise SecateurError(
                f"The linears in the saved files have {counted.weights} weights where the model's "
                f"have {weights + left_weights}; please report the model and the recipe."
            )
    if zeros < planned + rounded:
        raise SecateurError(
            f"The saved files hold {zeros} zeros where {planned + rounded} were planned; please "
            "report the model and the recipe."
        )
    return SparsityReport(
        target=plan.sparsity,
        zeros=zeros,
        weights=weights,
        counted=zeros / weights,
        rounded_to_zero=rounded,
        left_dense=len(left),
        overall=(zeros + left_zeros) / (weights + left_weights) if left else None,
    )
