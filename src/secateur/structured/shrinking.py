"""Shrink a model: from a name and a share to a smaller checkpoint and a report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from secateur.architecture import BlockList, find_blocks
from secateur.calibration import Calibration, load_calibration, source_files
from secateur.checkpoint.files import write_json, write_safetensors
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
from secateur.structured.bonsai import Round, RoundOptions, prune_round, remove, round_shares
from secateur.structured.export import export, plan_layout
from secateur.structured.masking import check_cuttable
from secateur.structured.options import ShrinkOptions
from secateur.structured.report import (
    ParameterReport,
    RoundReport,
    ShrinkReport,
    SubBlockReport,
)
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
    check_cuttable(blocks, job.sub_blocks, calibration.tokens)
    resumed = len(job.run.finished)
    kept = _run_rounds(job, options, blocks, calibration.tokens, shares, progress)
    watch.lap("rounds")
    del model, blocks
    counts = [len(units) for units in kept]
    layout = plan_layout(job.source, job.sub_blocks, counts, options.form)
    export(job.source, job.sub_blocks, kept, layout, job.run.output)
    parameters = _count_parameters(job, options, kept)
    watch.lap("checkpoint")
    seconds["total"] = time.perf_counter() - started
    finished = job.run.finished
    return ShrinkReport(
        model=job.name,
        options=options.model_dump(mode="json"),
        calibration=calibration.description,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        parameters=parameters,
        sub_blocks=_describe_sub_blocks(job.sub_blocks, counts, finished),
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
    """Return text for all rounds; what an earlier session of the run drew is used again."""
    saved = job.run.folder / "calibration.safetensors"
    if saved.is_file() and job.run.calibration:
        return Calibration(load_file(saved)["tokens"], job.run.calibration)
    samples = options.calibration.samples * rounds
    calibration = load_calibration(
        options.calibration.model_copy(update={"samples": samples}),
        job.tokenizer,
        model_loader=lambda: model,
        max_positions=positions_of(model.config),
        progress=progress,
    )
    write_safetensors(saved, {"tokens": calibration.tokens})
    job.run.record_calibration(calibration.description)
    return calibration


def _run_rounds(
    job: _Job,
    options: ShrinkOptions,
    blocks: BlockList,
    tokens_SL: Tensor,
    shares: Sequence[float],
    progress: Progress,
) -> list[Tensor]:
    """Return the units that are left after all rounds, those of earlier sessions included."""
    kept = all_units(job.sub_blocks)
    number = 0
    for done in job.run.finished:
        kept = remove(kept, [torch.tensor(each, dtype=torch.int64) for each in done["removed"]])
        number = done["number"] + 1
    windows_RWL = tokens_SL.unflatten(0, (len(shares), -1))
    look = RoundOptions(options.prior, options.masks, options.calibration.seed)
    # The last share is reached in one round unless its candidates were too few to fill it.
    while number < len(shares) or not job.goal.reached(1.0, [len(units) for units in kept]):
        share = shares[min(number, len(shares) - 1)]
        if not job.goal.reached(share, [len(units) for units in kept]):
            started = time.perf_counter()
            found = prune_round(
                blocks,
                job.sub_blocks,
                kept,
                job.goal,
                share,
                windows_RWL[number % len(shares)],
                job.dtype,
                number,
                look,
                progress,
            )
            kept = remove(kept, found.removed)
            took = time.perf_counter() - started
            job.run.record(_describe_round(job, kept, found, number, took))
        number += 1
    return kept


def _describe_round(
    job: _Job, kept: Sequence[Tensor], found: Round, number: int, seconds: float
) -> dict[str, Any]:
    """What the manifest keeps of a round: enough to go on behind it, and for the report."""
    finite = [utility for utility in found.utilities if isfinite(utility)]
    left = kept_parameters(job.sub_blocks, kept)
    dense = kept_parameters(job.sub_blocks, all_units(job.sub_blocks))
    report = RoundReport(
        share=(dense - left) / block_parameters(job.source.blocks),
        loss=found.loss,
        utility_mean=statistics.fmean(finite) if finite else None,
        utility_deviation=statistics.pstdev(finite) if finite else None,
        not_finite=len(found.utilities) - len(finite),
        seconds=round(seconds, 3),
    )
    return {
        "number": number,
        "removed": [units.tolist() for units in found.removed],
        "coefficients": found.coefficients,
        "tokens": found.tokens,
        "report": report.model_dump(mode="json"),
    }


def _describe_sub_blocks(
    sub_blocks: Sequence[SubBlock], counts: Sequence[int], finished: Sequence[dict[str, Any]]
) -> list[SubBlockReport]:
    return [
        SubBlockReport(
            block=sub_block.block,
            kind=sub_block.kind,
            kept=count,
            of=sub_block.units,
            parameters=count * sub_block.unit_parameters,
            removed_by_round=[len(each["removed"][place]) for each in finished],
            coefficients=[each["coefficients"][place] for each in finished],
        )
        for place, (sub_block, count) in enumerate(zip(sub_blocks, counts, strict=True))
    ]


def _count_parameters(job: _Job, options: ShrinkOptions, kept: Sequence[Tensor]) -> ParameterReport:
    """Count parameters in the files and hold them against what was decided."""

    def in_files(reader: CheckpointReader) -> int:
        return sum(torch.Size(shape).numel() for shape in reader.shapes.values())

    dense = kept_parameters(job.sub_blocks, all_units(job.sub_blocks))
    removed = dense - kept_parameters(job.sub_blocks, kept)
    before, after = in_files(job.source.reader), in_files(CheckpointReader(job.run.output))
    if options.form != "padded" and before - after != removed:
        raise SecateurError(
            f"The saved files hold {before - after} parameters less where {removed} were removed; "
            "please report the model and the options."
        )
    total = block_parameters(job.source.blocks)
    return ParameterReport(
        model_before=before,
        model_after=after,
        blocks_before=total,
        blocks_after=total - removed,
        target=options.sparsity,
        removed=removed / total,
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
