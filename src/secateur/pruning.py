"""Prune a model: from a name and a recipe to a checkpoint and a report."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.allocation import DenseModel
from secateur.allocation.edited import FromFile
from secateur.architecture import BlockList, find_blocks
from secateur.calibration import Calibration, load_calibration, source_files
from secateur.calibration.saved import calibrate_once
from secateur.checkpoint.files import write_json, write_text
from secateur.checkpoint.locate import load_model, load_tokenizer, locate_checkpoint
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.resident import ResidentStore
from secateur.checkpoint.run import Run, check_apart, fingerprint_checkpoint, fingerprint_files
from secateur.checkpoint.skeleton import (
    TensorMap,
    build_skeleton,
    check_length,
    map_tensors,
    positions_of,
)
from secateur.checkpoint.store import BlockStore
from secateur.checkpoint.streamed import StreamedStore
from secateur.errors import SecateurError
from secateur.inspection import inspect
from secateur.methods import GroupStage
from secateur.planning import Plan
from secateur.progress import Progress, silent
from secateur.recipe import Recipe
from secateur.report.document import (
    BlockReport,
    Report,
    SparsityReport,
    describe_block,
    describe_machine,
    package_versions,
    peak_device_memory,
    peak_memory,
)
from secateur.walk.activations import allocate, memory_budget
from secateur.walk.block import BlockPruner, wants_dense_stream, wants_targets
from secateur.walk.precision import resolve_device, resolve_dtype
from secateur.walk.pruned import Stopwatch
from secateur.walk.streams import Batches, Stream
from secateur.walk.walk import pass_finished, walk


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
        job = _job_in_memory(model, recipe, target, tokenizer)
    elif target is None:
        raise SecateurError("Pruning a checkpoint needs an output folder; name a new or empty one.")
    else:
        job = _job_from_checkpoint(model, recipe, target, tokenizer, restart, trust_remote_code)
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
        job = _job_in_memory(model, recipe, None, tokenizer)
    else:
        job = _job_from_checkpoint(model, recipe, None, tokenizer, False, trust_remote_code)
    if not recipe.allocation.measures:
        return recipe.allocation.allocate(job.plan, job.store.blocks, None)
    return _allocate(job, recipe, _calibrate(job, recipe, progress).tokens, progress)


@dataclass
class _Job:
    """A run whose inputs have been checked.

    The plan has the right sizes and total from the beginning; its zeros are divided once there
    is calibration text.
    """

    name: str
    store: BlockStore
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    load_dense: Callable[[], PreTrainedModel]
    device: torch.device
    dtype: torch.dtype
    run: Run | None
    streamed: bool
    in_memory: bool
    trust_remote_code: bool = False
    notes: list[str] = field(default_factory=list)


def _job_in_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    output: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> _Job:
    if tokenizer is None:
        raise SecateurError(
            "Pruning a model in memory needs its tokenizer for calibration text; pass tokenizer=."
        )
    device = resolve_device(recipe.device)
    blocks = find_blocks(model.eval())
    plan = recipe.allocation.prepare(blocks, recipe.pattern)
    check_length(blocks.model.config, recipe.calibration.length)
    # Weights in memory have no fingerprint that is worth its time, so such a run starts afresh.
    run = Run.open(output, {"model": str(time.time_ns())}, restart=False) if output else None
    return _Job(
        name=model.config._name_or_path or type(model).__name__,
        store=ResidentStore(blocks, output, device),
        plan=plan,
        tokenizer=tokenizer,
        load_dense=lambda: model,
        device=device,
        dtype=resolve_dtype(recipe.dtype, device),
        run=run,
        streamed=False,
        in_memory=True,
    )


@dataclass(frozen=True)
class _Inputs:
    """A checkpoint and a recipe that fit each other; nothing large has been read."""

    folder: Path
    reader: CheckpointReader
    blocks: BlockList
    tensors: TensorMap | str
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    texts: list[Path]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def check(
        cls,
        name: str | Path,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> _Inputs:
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, device)
        folder = locate_checkpoint(name, trust_remote_code=trust_remote_code)
        reader = CheckpointReader(folder)
        blocks = find_blocks(build_skeleton(folder, trust_remote_code=trust_remote_code))
        plan = recipe.allocation.prepare(blocks, recipe.pattern)
        check_length(blocks.model.config, recipe.calibration.length)
        return cls(
            folder=folder,
            reader=reader,
            blocks=blocks,
            tensors=map_tensors(blocks, reader),
            plan=plan,
            tokenizer=tokenizer or load_tokenizer(folder, trust_remote_code=trust_remote_code),
            texts=source_files(recipe.calibration),
            recipe=recipe,
            device=device,
            dtype=dtype,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        return {
            "model": fingerprint_checkpoint(self.reader),
            "recipe": _deciding_options(self.recipe, self.plan),
            "calibration text": fingerprint_files(self.texts),
            "forward": f"{self.dtype} on {self.device.type}",
            "versions": package_versions(),
        }


def fingerprint_run(
    model: str | Path, recipe: Recipe, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Check the inputs of a run as ``prune`` does, and say all that decides its result.

    Raises:
        SecateurError: whatever ``prune`` would raise before it reads weights or writes.
    """
    return _Inputs.check(model, recipe, None, trust_remote_code).fingerprint()


def _job_from_checkpoint(
    name: str | Path,
    recipe: Recipe,
    output: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    restart: bool,
    trust_remote_code: bool,
) -> _Job:
    given = _Inputs.check(name, recipe, tokenizer, trust_remote_code)
    folder, device, dtype = given.folder, given.device, given.dtype
    run = None
    if output is not None:
        check_apart(output, folder)
        run = Run.open(output, given.fingerprint(), restart=restart)
        _check_space(run, given.reader)

    load = partial(load_model, folder, trust_remote_code=trust_remote_code)

    notes: list[str] = []
    store: BlockStore
    if isinstance(given.tensors, str):
        notes.append(f"The whole model was loaded instead of one block at a time: {given.tensors}.")
        resident = load("auto")
        store = ResidentStore(find_blocks(resident), output, device, side_files=folder)
    else:
        resident = None
        store = StreamedStore(given.blocks, given.reader, given.tensors, output, device)
    return _Job(
        name=str(name),
        store=store,
        plan=given.plan,
        tokenizer=given.tokenizer,
        load_dense=lambda: load(dtype, device) if resident is None else resident,
        device=device,
        dtype=dtype,
        run=run,
        streamed=isinstance(store, StreamedStore),
        in_memory=False,
        trust_remote_code=trust_remote_code,
        notes=notes,
    )


def _execute(job: _Job, recipe: Recipe, progress: Progress) -> tuple[Report, dict[str, Tensor]]:
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
        Batches.of(len(tokens_SL), tokens_SL.shape[1], recipe.batch_tokens),
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
    )
    progress("Pruning blocks", resumed, count)
    for walked in walk(job.store, stream, dense_stream, job.plan, pruner, job.device):
        prefix = job.store.blocks.name(walked.index)
        finished.append(describe_block(walked))
        if job.in_memory:
            masks |= {f"{prefix}.{name}": mask for name, mask in walked.pruned.masks.items()}
        if job.run is not None:
            job.run.record(finished[-1].model_dump(mode="json"))
        progress("Pruning blocks", walked.index + 1, count)
    watch.lap("blocks")

    job.store.finish()
    sparsity = _count_zeros(job, masks)
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
    return report, masks


def _calibrate(job: _Job, recipe: Recipe, progress: Progress) -> Calibration:
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


def _allocate(job: _Job, recipe: Recipe, tokens_SL: Tensor, progress: Progress) -> Plan:
    """Return the run's plan; what an earlier session of the run decided is used again."""
    saved = None if job.run is None else job.run.folder / "plan.json"
    if saved is not None and saved.is_file():
        plan = Plan.from_file(saved)
        plan.check_fits(job.store.blocks)
        return plan
    dense = None
    if recipe.allocation.measures:
        dense = DenseModel(
            job.store,
            tokens_SL,
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


def _count_zeros(job: _Job, masks: dict[str, Tensor]) -> SparsityReport:
    """Count zeros in the files, where there are any, and hold them against the plan."""
    planned, weights = sum(job.plan.zeros.values()), sum(job.plan.weights.values())
    if job.run is None:
        zeros = sum(int((~mask).sum()) for mask in masks.values())
    else:
        counted = inspect(job.run.output, trust_remote_code=job.trust_remote_code)
        zeros, weights = counted.zeros, counted.weights
    if zeros < planned:
        raise SecateurError(
            f"The saved files hold {zeros} zeros where {planned} were planned; please report the "
            "model and the recipe."
        )
    return SparsityReport(
        target=job.plan.sparsity, zeros=zeros, weights=weights, counted=zeros / weights
    )


def _deciding_options(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The options that change the bytes of the result; resolved ones are recorded apart."""
    options = recipe.model_dump(mode="json")
    for name in ("device", "dtype", "activation_memory"):
        options.pop(name)
    if isinstance(recipe.allocation, FromFile):
        # What a plan file says decides, not where it lies.
        options["allocation"]["file"] = hashlib.sha256(plan.to_json().encode()).hexdigest()
    return options


def _check_space(run: Run, reader: CheckpointReader) -> None:
    """Find out now, not hours later, that the checkpoint will not fit on the disk."""
    have = shutil.disk_usage(run.output).free
    present = sum(path.stat().st_size for path in run.output.glob("model-*.safetensors"))
    need = reader.bytes_of(reader.files) - present
    if have < need:
        raise SecateurError(
            f"The result needs {need / 1e9:.1f} GB and the disk of {run.output} has "
            f"{have / 1e9:.1f} GB free; free some space or choose another disk."
        )
