"""Prune a model: from a name and a recipe to a checkpoint and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.allocation import DenseModel
from secateur.blocks.activations import allocate, memory_budget
from secateur.blocks.streams import Batches, Stream
from secateur.methods import GroupStage
from secateur.models.experts import linear_shapes
from secateur.models.inspection import inspect
from secateur.models.skeleton import (
    positions_of,
)
from secateur.patterns.plan import Plan
from secateur.pruning.block import BlockPruner, wants_dense_stream, wants_targets
from secateur.pruning.job import Job, job_from_checkpoint, job_in_memory
from secateur.pruning.pruned import describe_block
from secateur.pruning.recipe import Recipe
from secateur.pruning.walk import pass_finished, walk
from secateur.report.documents.prune import BlockReport, Report, SparsityReport
from secateur.report.page import write_report
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json, write_text
from secateur.runs.machine import describe_machine, peak_device_memory, peak_memory
from secateur.runs.progress import Progress, silent
from secateur.runs.stopwatch import Stopwatch
from secateur.text import Calibration, load_calibration
from secateur.text.saved import calibrate_once


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
        job = job_in_memory(model, recipe, target, tokenizer)
    elif target is None:
        raise SecateurError("Pruning a checkpoint needs an output folder; name a new or empty one.")
    else:
        job = job_from_checkpoint(model, recipe, target, tokenizer, restart, trust_remote_code)
        if job.run is not None and job.run.complete:
            saved = (target / "report.json").read_text(encoding="utf-8")
            return PruneResult(Report.model_validate_json(saved), target, None, {})
    report, masks = _execute(job, recipe, progress)
    if isinstance(model, PreTrainedModel):
        if target is not None:
            job.tokenizer.save_pretrained(target)
        return PruneResult(report, target, model, masks)
    return PruneResult(report, target, None, {})


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
        job = job_in_memory(model, recipe, None, tokenizer)
    else:
        job = job_from_checkpoint(model, recipe, None, tokenizer, False, trust_remote_code)
    if not recipe.allocation.measures:
        return recipe.allocation.allocate(job.plan, job.store.blocks, None)
    return _allocate(job, recipe, _calibrate(job, recipe, progress).tokens, progress)


def _execute(job: Job, recipe: Recipe, progress: Progress) -> tuple[Report, dict[str, Tensor]]:
    """Walk all blocks that are not finished, then write what makes them a checkpoint."""
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    watch = Stopwatch(seconds, job.device)
    calibration = _calibrate(job, recipe, progress)
    watch.lap("calibration text")

    tokens_SL = calibration.tokens
    job.plan = _allocate(job, recipe, tokens_SL, progress)
    watch.lap("allocation")
    folder = job.run.folder if job.run else None
    # The stream, that of the dense model and the outputs to fit to are of the same size.
    buffers = 1 + wants_dense_stream(recipe.stages) + wants_targets(recipe.stages)
    memory = memory_budget(recipe.activation_memory) // buffers
    stream = Stream(
        job.store,
        tokens_SL,
        Batches.of(len(tokens_SL), tokens_SL.shape[1], recipe.batch_tokens, recipe.fitted_windows),
        job.device,
        job.dtype,
        folder=folder,
        memory=memory,
        sizes={s.batch_sequences for s in recipe.stages if not isinstance(s, GroupStage)},
    )
    dense_stream = stream.twin(folder, memory) if wants_dense_stream(recipe.stages) else None
    targets_SLD = (
        allocate(tuple(stream.x_SLD.shape), folder, memory)
        if wants_targets(recipe.stages)
        else None
    )
    finished = [
        BlockReport.model_validate(saved) for saved in (job.run.finished if job.run else [])
    ]
    resumed, count = len(finished), len(job.store.blocks)
    for index in pass_finished(job.store, stream, dense_stream, resumed):
        progress("Passing finished blocks", index + 1, resumed)
    watch.lap("start")

    masks: dict[str, Tensor] = {}
    pruner = BlockPruner(
        recipe.stages,
        recipe.pattern,
        job.device,
        job.dtype,
        seed=recipe.calibration.seed,
        buffer_SLD=targets_SLD,
        masks=job.kept,
    )
    progress("Pruning blocks", resumed, count)
    for walked in walk(job.store, stream, dense_stream, job.plan, pruner, job.device):
        prefix = job.store.blocks.name(walked.index)
        finished.append(describe_block(walked.index, walked.held_out_error, walked.pruned))
        if job.in_memory:
            masks |= {f"{prefix}.{name}": mask for name, mask in walked.pruned.masks.items()}
        if job.run is not None:
            job.run.record(finished[-1].model_dump(mode="json"))
        progress("Pruning blocks", walked.index + 1, count)
    watch.lap("blocks")

    job.store.finish()
    sparsity = _count_zeros(job, masks, finished)
    watch.lap("checkpoint")
    seconds["total"] = time.perf_counter() - started
    report = Report(
        model=job.name,
        recipe=recipe.model_dump(mode="json"),
        calibration=calibration.description,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        streamed=job.streamed,
        sparsity=sparsity,
        blocks=finished,
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        resumed_blocks=resumed,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(job.device),
        machine=describe_machine(job.device),
        notes=job.notes,
    )
    if job.run is not None:
        write_text(job.run.folder / "recipe.yaml", recipe.to_yaml())
        job.plan.write(job.run.output / "plan.json")
        write_json(job.run.output / "report.json", report.model_dump(mode="json"))
        job.run.record_complete()
        write_report(job.run.output)
    return report, masks


def _calibrate(job: Job, recipe: Recipe, progress: Progress) -> Calibration:
    return calibrate_once(
        job.run,
        lambda: load_calibration(
            recipe.calibration,
            job.tokenizer,
            model_loader=job.load_dense,
            max_positions=positions_of(job.store.blocks.model.config),
            progress=progress,
        ),
    )


def _allocate(job: Job, recipe: Recipe, tokens_SL: Tensor, progress: Progress) -> Plan:
    """Return the run's plan; what an earlier session of the run decided is used again."""
    saved = None if job.run is None else job.run.folder / "plan.json"
    if saved is not None and saved.is_file():
        plan = Plan.from_file(saved)
        plan.check_fits(linear_shapes(job.store.blocks))
        return plan
    dense = None
    if recipe.allocation.measures:
        dense = DenseModel(
            job.store,
            tokens_SL[: recipe.fitted_windows],
            job.device,
            job.dtype,
            batch_tokens=recipe.batch_tokens,
            seed=recipe.calibration.seed,
            folder=job.run.folder if job.run else None,
            memory=memory_budget(recipe.activation_memory),
            progress=progress,
        )
    plan = recipe.allocation.allocate(job.plan, job.store.blocks, dense)
    if saved is not None:
        plan.write(saved)
    return plan


def _count_zeros(
    job: Job, masks: dict[str, Tensor], blocks: Sequence[BlockReport]
) -> SparsityReport:
    """Count zeros in the files, where there are any, and hold them against the plan."""
    planned, weights = sum(job.plan.zeros.values()), sum(job.plan.weights.values())
    rounded = sum(each.rounded_to_zero for block in blocks for each in block.linears.values())
    if job.run is None:
        zeros = sum(int((~mask).sum()) for mask in masks.values()) + rounded
    else:
        counted = inspect(job.run.output, trust_remote_code=job.trust_remote_code)
        zeros, weights = counted.zeros, counted.weights
    if zeros < planned + rounded:
        raise SecateurError(
            f"The saved files hold {zeros} zeros where {planned + rounded} were planned; please "
            "report the model and the recipe."
        )
    return SparsityReport(
        target=job.plan.sparsity,
        zeros=zeros,
        weights=weights,
        counted=zeros / weights,
        rounded_to_zero=rounded,
    )
