"""Recover a cut model: from two folders and text to a checkpoint and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secateur.blocks.streams import Batches, Stream, memory_budget
from secateur.evaluation.scores import score_windows
from secateur.methods.reconstruct import Reconstruct
from secateur.models.checkpoint import Checkpoint
from secateur.models.store import check_finite
from secateur.models.streamed import StreamedStore
from secateur.models.structure import find_blocks
from secateur.report.documents.training import (
    AdaptersReport,
    FittedBlockReport,
    NetworkReport,
    RecoveryReport,
    RecoveryValidation,
)
from secateur.report.page import write_report
from secateur.runs.files import copy_file
from secateur.runs.meter import Meter, Stopwatch
from secateur.runs.progress import Progress, silent
from secateur.training.adapters import Adapted, Adapters
from secateur.training.block_fitting import FittedBlock, fit_blocks, pass_fitted
from secateur.training.chosen import Chosen
from secateur.training.holding import Whole
from secateur.training.job import TEMPORARY
from secateur.training.recovery_job import Job, taken
from secateur.training.recovery_options import Recovery
from secateur.training.saving import file_names, round_to_stored, save
from secateur.training.state import read_state
from secateur.training.train import curve, do_steps, find_teacher
from secateur.training.trainer import Trainer

_BATCH_TOKENS = 4096
# What shrinking writes beside the weights stays true.
_KEPT = "kept.safetensors"


@dataclass(frozen=True)
class RecoverResult:
    """What ``recover`` returns.

    Attributes:
        report: what was done and what it cost.
        output: the checkpoint folder.
    """

    report: RecoveryReport
    output: Path


def recover(
    model: str | Path,
    output: str | Path,
    options: Recovery | None = None,
    *,
    teacher: str | Path,
    data: Sequence[str],
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> RecoverResult:
    """Teach a model that was cut what the dense one knew.

    Its blocks are fitted one after the other to the dense model's hidden states, one in memory;
    then the whole learns from the dense model's probabilities. Windows that are held out of the
    text choose the checkpoint. The result has the form of the input.

    Args:
        model: folder of the cut model, widths in any form.
        output: a new or empty folder, or that of an interrupted run to go on with.
        options: what to do.
        teacher: the dense model that it was cut from.
        data: text files, folders of them, hub data sets; none that is evaluated on.
        restart: start over in the folder of an earlier run.
        trust_remote_code: let the checkpoint's own Python code run, as blocks of different widths
            need.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible.
    """
    target = Path(output).expanduser()
    with taken(
        model,
        options or Recovery(),
        target,
        teacher=teacher,
        data=data,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
    ) as job:
        report = job.run.live(
            RecoveryReport,
            lambda: _execute(job, progress),
            page=write_report,
            temporary=TEMPORARY,
        )
    return RecoverResult(report, target)


def _execute(job: Job, progress: Progress) -> RecoveryReport:
    run, options, device = job.run, job.options, job.training.device
    meter = Meter(device)
    resumed = max(0, len(run.finished) - 1)
    if not run.finished:
        folders = {"dense": job.dense.folder, "before": job.cut.folder}
        run.record({name: _loss_of(job, folder) for name, folder in folders.items()})
    meter.lap("start")
    before = run.finished[0]["before"]
    checkpoint, after, after_blocks = job.cut, before, None
    notes: list[str] = []
    if options.blocks is not None:
        fitted = _fit_blocks(job, options.blocks, progress)
        after_blocks = _loss_of(job, fitted.folder)
        meter.lap("blocks")
        if after_blocks < before:
            checkpoint, after = fitted, after_blocks
        else:
            notes.append("Fitted blocks left out, the held-out loss would not fall with them.")
    network = None
    if options.network == "none":
        _copy(job, checkpoint)
    else:
        network = _train(job, checkpoint, meter, progress)
        after = network.loss
    kept = job.cut.folder / "secateur" / _KEPT
    if kept.is_file():
        copy_file(kept, run.folder / _KEPT)
    meter.lap("checkpoint")
    return RecoveryReport(
        model=job.training.model.name,
        teacher=job.teacher,
        options=options.model_dump(mode="json"),
        text=run.manifest.text,
        forward_dtype=str(job.training.dtype).removeprefix("torch."),
        blocks=[FittedBlockReport.model_validate(each) for each in run.finished[1:]],
        network=network,
        validation=RecoveryValidation(
            windows=len(job.training.text.held_out_WL),
            length=options.length,
            dense=run.finished[0]["dense"],
            before=before,
            after_blocks=after_blocks,
            after=after,
        ),
        resumed_blocks=resumed,
        notes=notes,
        **meter.costs(),
    )


def _loss_of(job: Job, folder: Path) -> float:
    """Loss of a checkpoint on the held-out windows, nats per token."""
    dtype = job.training.dtype
    model = job.training.load(folder, dtype)
    windows_WL = job.training.text.held_out_WL.long()
    return float(score_windows(model, windows_WL, dtype=dtype).loss_W.mean())


def _fit_blocks(job: Job, stage: Reconstruct, progress: Progress) -> Checkpoint:
    """Fit all blocks that no earlier session has fitted; return them as a checkpoint."""
    run = job.run
    folder = run.folder / "blocks"
    store, dense = job.store(job.cut, folder), job.store(job.dense, None)
    done = len(run.finished) - 1
    count = len(store.blocks)
    if not (folder / "model.safetensors.index.json").is_file():
        stream, dense_stream = (_stream(job, each, stage) for each in (store, dense))
        pass_fitted(store, dense, stream, dense_stream, done)
        progress("Fitting blocks", done, count)
        for fitted in fit_blocks(store, dense, stream, dense_stream, stage, job.options.seed):
            run.record(_described(fitted), store.written(fitted.index))
            progress("Fitting blocks", fitted.index + 1, count)
        store.finish()
    return Checkpoint.open(folder, trust_remote_code=job.training.trust_remote_code)


def _stream(job: Job, store: StreamedStore, stage: Reconstruct) -> Stream:
    tokens_SL = job.block_windows_SL
    return Stream(
        store,
        tokens_SL,
        Batches.of(len(tokens_SL), tokens_SL.shape[1], _BATCH_TOKENS),
        job.training.device,
        job.training.dtype,
        job.run.folder,
        memory_budget(None) // 2,
        {stage.batch_sequences},
    )


def _copy(job: Job, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as the result."""
    store = job.store(checkpoint, job.run.output)
    for index in range(len(store.blocks)):
        store.load(index)
        store.save(index, {})
        store.release(index)
    store.finish()


def _described(fitted: FittedBlock) -> dict[str, object]:
    return FittedBlockReport(
        index=fitted.index, before=fitted.before, after=fitted.after, notes=list(fitted.notes)
    ).model_dump(mode="json")


def _train(job: Job, checkpoint: Checkpoint, watch: Stopwatch, progress: Progress) -> NetworkReport:
    """Train the network, take the weights that held-out text prefers, and write them."""
    options = job.options
    model = replace(job.training.model, checkpoint=checkpoint)
    training = replace(job.training, model=model)
    network = training.load(checkpoint.folder, torch.float32)
    blocks = find_blocks(network)
    for index, block in enumerate(blocks):
        check_finite(block.state_dict(), blocks.name(index))
    names = file_names(blocks, checkpoint.reader, checkpoint.tensors)
    adapters = None
    if options.network == "lora":
        adapters = Adapters(blocks, options.rank, options.seed)
    teacher, _ = find_teacher(training, progress)
    watch.lap("teacher")
    holding = Whole(blocks, []) if adapters is None else Adapted(blocks, adapters)
    trainer = Trainer(holding, teacher, training.text.train_WL, training.options, training.dtype)
    read_state(training.work, trainer, training.ranks)
    resumed = trainer.done
    chosen = Chosen(training.work / "chosen.safetensors", trainer.parameters)
    log = do_steps(training, trainer, progress, chosen.offer)
    assert log is not None, "recovery runs in one process"
    watch.lap("steps")
    lowest = chosen.take()
    if adapters is not None:
        adapters.merge()
    round_to_stored(blocks, checkpoint.reader, names)
    loss = trainer.validation_loss(training.text.held_out_WL)
    tensors = checkpoint.tensors
    save(holding, checkpoint.reader, tensors, names, job.run.output, training.ranks)
    validations = [dict(entry) for entry in log.with_key("validation_loss")]
    return NetworkReport(
        adapters=None
        if adapters is None
        else AdaptersReport(
            rank=options.rank, parameters=sum(p.numel() for p in adapters.parameters.values())
        ),
        steps=trainer.done,
        tokens=trainer.done * training.options.step_tokens,
        chosen_step=next(
            int(each["step"]) for each in validations if each["validation_loss"] == lowest
        ),
        loss=loss,
        curve=curve(log),
        validations=validations,
        resumed_steps=resumed,
    )
