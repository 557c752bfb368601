"""Train a model: from names and options to a checkpoint and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from secateur.models.inspection import inspect
from secateur.models.origin import read_origin
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.report.documents.prune import Report, SparsityReport
from secateur.report.documents.training import LowRankReport, TrainingReport, ValidationReport
from secateur.report.page import write_report
from secateur.runs.device import resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text
from secateur.runs.meter import Meter
from secateur.runs.progress import Progress, silent
from secateur.training.job import TEMPORARY, Job, taken
from secateur.training.loading import find_teacher, load_student
from secateur.training.options import Training
from secateur.training.ranks import joined
from secateur.training.saving import ADAPTER, round_to_stored, save
from secateur.training.start import (
    count_zeros,
    first_plan,
    named_linears,
    start_slorb_by_covariance,
)
from secateur.training.state import states
from secateur.training.steps import curve, do_steps, resume
from secateur.training.trainer import Trainer

# With fewer steps than this the published shares of the schedule mean little.
_FEW_STEPS = 200
# The one-shot start: calibration windows, their length, and how many times their tokens the text
# has that they are drawn from.
_START_SAMPLES = 128
_START_LENGTH = 512
_START_POOL = 4


@dataclass(frozen=True)
class TrainResult:
    """What ``train`` returns.

    Attributes:
        report: what was done and what it cost.
        output: the checkpoint folder.
    """

    report: TrainingReport
    output: Path


def train(
    model: str | Path,
    options: Training,
    output: str | Path,
    *,
    data: Sequence[str],
    validation: str | None = None,
    teacher: str | Path | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> TrainResult:
    """Train a model whose linears are masked; the zeros of the saved checkpoint are exact.

    Args:
        model: checkpoint folder, hub id or GGUF file; dense, or pruned by this package, whose
            masks it then starts from.
        options: what to do.
        output: a new or empty folder, or that of an interrupted run to go on with.
        data: text files, folders of them, hub data sets; with ``:WEIGHT`` behind every name, in
            these proportions.
        validation: text file or hub data set to validate with; windows of ``data`` that are not
            trained on if None.
        teacher: the dense model to learn from; ``model`` itself if None and that is dense.
        restart: start over in the folder of an earlier run.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible; or a
            loss that is not finite, with the last good state kept.
    """
    target = Path(output).expanduser()
    with joined(resolve_device(options.device)) as (ranks, device), ExitStack() as held:
        # The first process takes the folder; the others find it as it was left.
        for mine in ranks.in_turn():
            if mine:
                job = held.enter_context(
                    taken(
                        model,
                        options,
                        target,
                        data=data,
                        validation=validation,
                        teacher=teacher,
                        restart=restart and ranks.first,
                        trust_remote_code=trust_remote_code,
                        progress=progress,
                        device=device,
                        ranks=ranks,
                    )
                )

        def work() -> TrainingReport:
            report = _execute(job, progress)
            assert report is not None, "the first process reports"
            return report

        if ranks.first:
            job.run.live(TrainingReport, work, page=write_report, temporary=TEMPORARY)
        elif not job.run.manifest.complete:
            _execute(job, progress)
        ranks.wait()
    saved = (target / "report.json").read_text(encoding="utf-8")
    return TrainResult(TrainingReport.model_validate_json(saved), target)


def _execute(job: Job, progress: Progress) -> TrainingReport | None:
    """Train and write the checkpoint; the first process returns the report."""
    meter = Meter(job.device)
    source, start = job.model.folder, None
    if job.prunes_first:
        for mine in job.ranks.in_turn():
            if mine:
                source, start = _prune_first(job, progress)
        meter.lap("one-shot")
    holding = load_student(job, source)
    meter.lap("start")
    if job.options.starts_by_covariance and not states(job.work):
        start_slorb_by_covariance(
            holding.blocks,
            holding.linears,
            job.dense,
            job.text.train_WL,
            batch=job.options.micro_batch_windows,
            dtype=job.dtype,
            progress=progress,
        )
        meter.lap("low rank")
    teacher, dense_loss = find_teacher(job, progress)
    meter.lap("teacher")

    trainer = Trainer(holding, teacher, job.text.train_WL, job.options, job.dtype, job.ranks)
    resumed = resume(job, trainer)
    log = do_steps(job, trainer, progress)
    meter.lap("steps")

    trainer.remove()
    round_to_stored(holding.blocks, job.model.checkpoint)
    after = trainer.validation_loss(job.text.held_out_WL)
    save(holding, job.model.checkpoint, job.run.output, job.ranks)
    zeros = job.ranks.total(count_zeros(holding.linears))
    if log is None:
        return None
    sparsity = _count_zeros(job, zeros)
    meter.lap("checkpoint")
    validations = log.with_key("validation_loss")
    return TrainingReport(
        model=job.model.name,
        origin=read_origin(job.model.name, job.model.folder),
        teacher=None if job.teacher is None else job.teacher[0],
        options=job.options.model_dump(mode="json"),
        start=start,
        text=job.run.manifest.text,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        sparsity=sparsity,
        low_rank=_low_rank(trainer),
        steps=trainer.done,
        tokens=trainer.done * job.options.step_tokens,
        validation=ValidationReport(
            windows=len(job.text.held_out_WL),
            length=job.options.length,
            dense=dense_loss,
            before=validations[0]["validation_loss"],
            after=after,
        ),
        curve=curve(log),
        validations=[dict(entry) for entry in validations],
        resumed_steps=resumed,
        notes=_notes(job.options),
        **meter.costs(),
    )


def _count_zeros(job: Job, planned: int) -> SparsityReport:
    """Count zeros in the files and hold them against the masks."""
    counted = inspect(job.run.output, trust_remote_code=job.trust_remote_code)
    if counted.zeros < planned:
        raise SecateurError(
            f"The saved files hold {counted.zeros} zeros where the masks have {planned}; please "
            "report the model and the options."
        )
    blocks = job.model.checkpoint.blocks
    masked = sum(first_plan(blocks, job.options).weights.values())
    if masked == counted.weights:
        zeros, overall, left = counted.zeros, None, 0
    else:
        # Linears without a mask may have zeros of their own in the files.
        everything = named_linears(replace(blocks, chosen=None))
        zeros, overall = planned, counted.sparsity
        left = len(everything) - len(named_linears(blocks))
    return SparsityReport(
        target=planned / masked,
        zeros=zeros,
        weights=masked,
        counted=zeros / masked,
        left_dense=left,
        overall=overall,
    )


def _low_rank(trainer: Trainer) -> LowRankReport | None:
    boosts = [each.low_rank for each in trainer.linears if each.low_rank is not None]
    if not boosts:
        return None
    parameters = sum(p.numel() for boost in boosts for p in boost.parameters())
    weights = sum(each.mask.numel() for each in trainer.linears)
    return LowRankReport(folder=ADAPTER, parameters=parameters, share=parameters / weights)


def _notes(options: Training) -> list[str]:
    if options.steps >= _FEW_STEPS or options.keeps_mask:
        return []
    return [
        f"{options.tokens:,} tokens are {options.steps} steps of {options.step_tokens:,}; smaller "
        "steps (batch_tokens) let masks and schedule do more."
    ]


def _prune_first(job: Job, progress: Progress) -> tuple[Path, Report]:
    """Prune the dense model by the recipe ``auto`` inside the run's work folder, or go on with it.

    Calibration text is the beginning of the training text, so held-out windows stay unseen.
    """
    work = job.work / "start"
    text, output = work / "text.jsonl", work / "pruned"
    if not text.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(text, _as_documents(job))
    recipe = first_recipe(
        job.options,
        text.resolve(),
        bos=job.encoder.bos,
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
    )
    result = prune(
        job.model.folder,
        recipe,
        output,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )
    return output, result.report


def first_recipe(
    options: Training,
    text: Path,
    *,
    bos: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Recipe:
    """The recipe that a dense model is pruned by before it is trained, on the text in a file."""
    return Recipe.from_mapping(
        {
            "pattern": str(options.pattern),
            "stages": "auto",
            "only": options.only,
            "skip": options.skip,
            "calibration": {
                "source": str(text),
                "samples": _START_SAMPLES,
                "length": min(_START_LENGTH, options.length),
                "seed": options.seed,
                "bos": bos,
            },
            "device": device,
            "dtype": dtype,
        }
    )


def _as_documents(job: Job) -> str:
    first = job.encoder.first
    windows: Tensor = job.text.train_WL[
        : -(-_START_POOL * _START_SAMPLES * _START_LENGTH // job.options.length)
    ]
    # The one-shot start puts the token in front of its own windows.
    bodies = (each[1:] if each[0] == first else each for each in windows.tolist())
    texts = (job.encoder.tokenizer.decode(body) for body in bodies)
    return "".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\n" for text in texts)
