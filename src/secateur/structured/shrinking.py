"""Shrink a model: from a name and a share to a smaller checkpoint and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from secateur.architecture import find_blocks
from secateur.calibration import Calibration, load_calibration, source_files
from secateur.calibration.saved import calibrate_once
from secateur.checkpoint.files import write_json
from secateur.checkpoint.locate import load_tokenizer
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.run import Run, fingerprint_files
from secateur.checkpoint.skeleton import check_length, positions_of
from secateur.errors import SecateurError
from secateur.progress import Progress, silent
from secateur.report.document import (
    describe_machine,
    package_versions,
    peak_device_memory,
    peak_memory,
)
from secateur.structured.bonsai import Parent, RoundOptions, round_shares
from secateur.structured.export import check_saved, export, plan_layout
from secateur.structured.masking import check_cuttable
from secateur.structured.options import ShrinkOptions
from secateur.structured.report import (
    RoundReport,
    ShrinkReport,
    count_parameters,
    describe_sub_blocks,
)
from secateur.structured.rounds import run_rounds
from secateur.structured.selection import Anywhere, Exactly, Goal
from secateur.structured.source import Source, open_source
from secateur.structured.uniform import uniform_widths
from secateur.structured.units import (
    SubBlock,
    all_units,
    block_parameters,
    find_sub_blocks,
    kept_parameters,
)
from secateur.walk.precision import resolve_device, resolve_dtype
from secateur.walk.pruned import Stopwatch


@dataclass(frozen=True)
class ShrinkResult:
    """What ``shrink`` returns.

    Attributes:
        report: what was removed and what it cost.
        output: the checkpoint folder.
    """

    report: ShrinkReport
    output: Path


def shrink(
    model: str | Path,
    output: str | Path,
    options: ShrinkOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ShrinkResult:
    """Remove feed-forward channels and attention heads, and save the smaller model.

    The model is in memory once, as for inference; the result is cut from the files.

    Args:
        model: a checkpoint folder, hub id or GGUF file.
        output: a new or empty folder for the result, or that of an interrupted run to go on with.
        options: how much goes and how it is chosen; half of the blocks if None.
        tokenizer: for calibration text; the checkpoint's own if None.
        restart: start over in the folder of an earlier run.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible.
    """
    options = options or ShrinkOptions()
    target = Path(output).expanduser()
    job = _prepare(model, target, options, tokenizer, restart, trust_remote_code)
    if job.run.complete:
        saved = (target / "report.json").read_text(encoding="utf-8")
        return ShrinkResult(ShrinkReport.model_validate_json(saved), target)
    report = _execute(job, options, progress)
    write_json(target / "report.json", report.model_dump(mode="json"))
    job.run.record_complete()
    return ShrinkResult(report, target)


@dataclass(frozen=True)
class _Job:
    """A run whose inputs have been checked."""

    name: str
    source: Source
    sub_blocks: list[SubBlock]
    goal: Goal
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    run: Run


def _prepare(
    name: str | Path,
    output: Path,
    options: ShrinkOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    restart: bool,
    trust_remote_code: bool,
) -> _Job:
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    source = open_source(name, trust_remote_code=trust_remote_code)
    if output.resolve() == source.folder.resolve():
        raise SecateurError(f"The output folder {output} is the model itself; name another.")
    sub_blocks = find_sub_blocks(source.blocks, ffn_only=options.ffn_only)
    goal = _goal(source, sub_blocks, options)
    check_cuttable(source.store(device), sub_blocks)
    check_length(source.blocks.model.config, options.calibration.length)
    tokenizer = tokenizer or load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    files = [source.folder / file for file in sorted(set(source.reader.files.values()))]
    run = Run.open(
        output,
        {
            "model": fingerprint_files([source.folder / "config.json", *files]),
            "options": options.model_dump(mode="json", exclude={"device", "dtype"}),
            "calibration text": fingerprint_files(source_files(options.calibration)),
            "forward": f"{dtype} on {device.type}",
            "versions": package_versions(),
        },
        restart=restart,
    )
    return _Job(str(name), source, sub_blocks, goal, tokenizer, device, dtype, run)


def _goal(source: Source, sub_blocks: Sequence[SubBlock], options: ShrinkOptions) -> Goal:
    """What is to go, once it is certain that the result can be stored."""
    total = block_parameters(source.blocks)
    budget = round(options.sparsity * total)
    units = [sub_block.units for sub_block in sub_blocks]
    costs = [sub_block.unit_parameters for sub_block in sub_blocks]
    removable = kept_parameters(sub_blocks, all_units(sub_blocks))
    if budget > removable - min(costs):
        kind = "feed-forwards" if options.ffn_only else "units that can be removed"
        raise SecateurError(
            f"Removing {options.sparsity:.1%} of the blocks' parameters would empty the model, its "
            f"{kind} hold {removable / total:.1%} of them; remove less."
        )
    if budget < min(costs):
        raise SecateurError(
            f"{options.sparsity:.4%} of the blocks' parameters are less than the smallest unit; "
            f"remove {min(costs) / total:.4%} or more."
        )
    if options.form == "uniform":
        widths = uniform_widths(source, sub_blocks, budget, options.sparsity)
        return Exactly([widths.of(sub_block) for sub_block in sub_blocks], units)
    plan_layout(source, sub_blocks, units, options.form)
    return Anywhere(budget, units, costs)


def _execute(job: _Job, options: ShrinkOptions, progress: Progress) -> ShrinkReport:
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    watch = Stopwatch(seconds, job.device)
    model = _load(job)
    watch.lap("loading")
    shares = round_shares(options.sparsity, options.step)
    calibration = _calibrate(job, options, model, len(shares), progress)
    watch.lap("calibration text")
    blocks = find_blocks(model)
    resumed = len(job.run.finished)
    kept = run_rounds(
        job.run,
        Parent(blocks, job.sub_blocks, job.dtype),
        job.goal,
        shares,
        calibration.tokens,
        RoundOptions(options.prior, options.masks, options.calibration.seed),
        progress,
    )
    watch.lap("rounds")
    # The result is cut from the files; the model need not be there twice.
    del model, blocks
    counts = [len(units) for units in kept]
    layout = plan_layout(job.source, job.sub_blocks, counts, options.form)
    export(job.source, job.sub_blocks, kept, layout, job.run.output)
    check_saved(job.source, layout, job.run.output)
    watch.lap("checkpoint")
    seconds["total"] = time.perf_counter() - started
    finished = job.run.finished
    return ShrinkReport(
        model=job.name,
        options=options.model_dump(mode="json"),
        calibration=calibration.description,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        parameters=count_parameters(
            job.source,
            CheckpointReader(job.run.output),
            job.sub_blocks,
            kept,
            options.sparsity,
            padded=options.form == "padded",
        ),
        sub_blocks=describe_sub_blocks(job.sub_blocks, kept, finished),
        rounds=[RoundReport.model_validate(each["report"]) for each in finished],
        forward_tokens=sum(each["tokens"] for each in finished),
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        resumed_rounds=resumed,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(job.device),
        machine=describe_machine(job.device),
        notes=_notes(job.source, layout.config, options),
    )


def _load(job: _Job) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job.source.folder,
        dtype=job.dtype,
        device_map=str(job.device),
        trust_remote_code=job.source.trust_remote_code,
    )
    model.eval()
    return model


def _calibrate(
    job: _Job, options: ShrinkOptions, model: PreTrainedModel, rounds: int, progress: Progress
) -> Calibration:
    """Text for all rounds, each with windows of its own."""
    samples = options.calibration.samples * rounds
    return calibrate_once(
        job.run,
        lambda: load_calibration(
            options.calibration.model_copy(update={"samples": samples}),
            job.tokenizer,
            model_loader=lambda: model,
            max_positions=positions_of(model.config),
            progress=progress,
        ),
    )


def _notes(source: Source, config: dict[str, Any], options: ShrinkOptions) -> list[str]:
    notes = []
    if options.form == "padded":
        notes.append("The files hold zeros in place of what was removed: nothing is faster.")
    if config["model_type"] != source.config["model_type"]:
        notes.append(
            f"Stored as {config['model_type']}, which computes the same: the configuration of "
            f"{source.config['model_type']} refuses {config[source.names.heads]} heads."
        )
    return notes
