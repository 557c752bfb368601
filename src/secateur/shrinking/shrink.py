"""Shrink a model: from a name and a share to a smaller checkpoint and a report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.models.origin import read_origin
from secateur.report.documents.shrink import ShrinkReport
from secateur.report.page import write_report
from secateur.runs.meter import Meter
from secateur.runs.progress import Progress, silent
from secateur.shrinking.export import (
    as_they_were,
    check_saved,
    compare_formats,
    count_parameters,
    export,
)
from secateur.shrinking.job import Job, taken
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.nested import choose_nested
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.refit import read_refitted
from secateur.shrinking.rounds import choose_in_rounds
from secateur.text.options import fitted_share, note_on_tokens


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
    with taken(model, target, options, tokenizer, restart, trust_remote_code, progress) as job:
        report = job.run.live(
            ShrinkReport,
            lambda: _execute(job, progress),
            page=write_report,
            temporary=("refitted",),
        )
    return ShrinkResult(report, target)


def _execute(job: Job, progress: Progress) -> ShrinkReport:
    options = job.options
    meter = Meter(job.device)
    job.source.store(job.device).check_outside()
    choose = choose_in_rounds if options.preset == "paper" else choose_nested
    chosen = choose(job, meter, progress)
    widths = [
        sub_block.width_of(units)
        for sub_block, units in zip(job.sub_blocks, chosen.kept, strict=True)
    ]
    layout = plan_layout(job.source, job.sub_blocks, widths, options.form, options.grid)
    # The result is cut from the files; no model is in memory.
    new = as_they_were if chosen.refitted is None else partial(read_refitted, chosen.refitted)
    export(job.source, job.sub_blocks, chosen.kept, layout, job.run.output, new)
    saved = check_saved(job.source, layout, job.run.output)
    meter.lap("checkpoint")
    return ShrinkReport(
        model=job.name,
        origin=read_origin(job.name, job.source.folder),
        options=options.model_dump(mode="json"),
        calibration=chosen.calibration,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        parameters=count_parameters(
            job.source,
            saved.reader,
            job.sub_blocks,
            chosen.kept,
            options.sparsity,
            padded=options.form == "padded",
        ),
        sub_blocks=chosen.sub_blocks,
        rounds=list(chosen.rounds),
        survey=chosen.survey,
        latency=chosen.latency,
        formats=compare_formats(job.source, saved),
        forward_tokens=chosen.tokens,
        resumed=chosen.resumed,
        notes=[*chosen.notes, *_notes(job, layout.config)],
        **meter.costs(),
    )


def _notes(job: Job, config: dict[str, Any]) -> list[str]:
    notes = []
    source, options = job.source, job.options
    if options.preset == "default":
        calibration, blocks = options.calibration, source.blocks
        fitted = fitted_share(calibration.samples) * calibration.length
        widths = [each.output_linear(blocks[each.block]) for each in job.free]
        widest = max(linear.weight_OI.shape[1] for linear in widths)
        notes += note_on_tokens(["The refit"], fitted, widest)
        if options.form == "uniform" and "sub_models" in options.model_fields_set:
            notes.append("No sub-models were tried: with uniform widths there is none to choose.")
    if job.options.form == "padded":
        notes.append("The files hold zeros in place of what was removed: nothing is faster.")
    if config["model_type"] != source.config["model_type"]:
        notes.append(
            f"Stored as {config['model_type']}, which computes the same: the configuration of "
            f"{source.config['model_type']} refuses {config[source.names.heads]} heads."
        )
    return notes
