"""Recover a cut model: from two folders and text to a checkpoint and a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from secateur.blocks.streams import Batches, Stream, loaded_blocks, memory_budget
from secateur.evaluation.scores import score_windows
from secateur.methods.reconstruct import Reconstruct
from secateur.models.checkpoint import Checkpoint
from secateur.models.files import INDEX
from secateur.models.masks import masks_path
from secateur.models.origin import read_origin
from secateur.models.streamed import StreamedStore
from secateur.report.documents.training import (
    AdaptersReport,
    FittedBlockReport,
    NetworkReport,
    RecoveryReport,
    RecoveryValidation,
)
from secateur.report.page import write_report
from secateur.runs.device import resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.files import copy_file, read_sealed, write_safetensors
from secateur.runs.limits import tokens_at_once
from secateur.runs.meter import Meter, Stopwatch
from secateur.runs.progress import Progress, silent
from secateur.runs.run import Run, check_apart
from secateur.training.adapters import Adapted, check_peft, count_parameters
from secateur.training.block_fitting import fit_blocks, pass_fitted
from secateur.training.holding import Holding
from secateur.training.job import TEMPORARY, Job
from secateur.training.job import taken as training_taken
from secateur.training.loading import find_teacher, load_finite
from secateur.training.ranks import ALONE
from secateur.training.recovery_options import Recovery
from secateur.training.saving import round_to_stored, save
from secateur.training.steps import curve, do_steps, resume
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


@dataclass(frozen=True)
class RecoveryJob(Job):
    """A run of recovery whose inputs have been checked; ``model`` is the cut model.

    Attributes:
        recovery: what to do.
        whole: the dense model, that it was cut from.
    """

    recovery: Recovery
    whole: Checkpoint

    def store(self, checkpoint: Checkpoint, output: Path | None) -> StreamedStore:
        """Give out a checkpoint's blocks, one at a time."""
        return checkpoint.store(self.device, output)


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


def _execute(job: RecoveryJob, progress: Progress) -> RecoveryReport:
    run, options = job.run, job.recovery
    meter = Meter(job.device)
    for each in (job.model.checkpoint, job.whole):
        job.store(each, None).check_outside()
    resumed = max(0, len(run.finished) - 1)
    if not run.finished:
        folders = {"dense": job.whole.folder, "before": job.model.folder}
        run.record({name: _loss_of(job, folder) for name, folder in folders.items()})
    meter.lap("start")
    before = run.finished[0]["before"]
    checkpoint, after, after_blocks = job.model.checkpoint, before, None
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
    kept = job.model.folder / "secateur" / _KEPT
    if kept.is_file():
        copy_file(kept, run.folder / _KEPT)
    meter.lap("checkpoint")
    assert job.teacher is not None, "options of recovery ask for a teacher"
    return RecoveryReport(
        model=job.model.name,
        origin=read_origin(job.model.name, job.model.folder),
        teacher=job.teacher[0],
        options=options.model_dump(mode="json"),
        text=run.manifest.text,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        blocks=[FittedBlockReport.model_validate(each) for each in run.finished[1:]],
        network=network,
        validation=RecoveryValidation(
            windows=len(job.text.held_out_WL),
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


def _loss_of(job: RecoveryJob, folder: Path) -> float:
    """Loss of a checkpoint on the held-out windows, nats per token."""
    windows_WL = job.text.held_out_WL.long()
    scores = score_windows(job.load(folder, job.dtype), windows_WL, dtype=job.dtype)
    return float(scores.loss_W.mean())


def _fit_blocks(job: RecoveryJob, stage: Reconstruct, progress: Progress) -> Checkpoint:
    """Fit all blocks that no earlier session has fitted; return them as a checkpoint."""
    run = job.run
    folder = run.folder / "blocks"
    store, dense = job.store(job.model.checkpoint, folder), job.store(job.whole, None)
    done = len(run.finished) - 1
    count = len(store.blocks)
    if not (folder / INDEX).is_file():
        stream, dense_stream = (_stream(job, each, stage) for each in (store, dense))
        pass_fitted(store, dense, stream, dense_stream, done)
        progress("Fitting blocks", done, count)
        for fitted in fit_blocks(store, dense, stream, dense_stream, stage, job.recovery.seed):
            run.record(fitted.model_dump(mode="json"), store.written(fitted.index))
            progress("Fitting blocks", fitted.index + 1, count)
        store.finish()
    return Checkpoint.open(folder, trust_remote_code=job.trust_remote_code)


def _stream(job: RecoveryJob, store: StreamedStore, stage: Reconstruct) -> Stream:
    tokens_SL = job.text.train_WL[: job.recovery.block_windows]
    return Stream(
        store,
        tokens_SL,
        Batches.of(len(tokens_SL), tokens_SL.shape[1], tokens_at_once(_BATCH_TOKENS)),
        job.device,
        job.dtype,
        job.run.folder,
        memory_budget(None) // 2,
        {stage.batch_sequences},
    )


def _copy(job: RecoveryJob, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as the result."""
    store = job.store(checkpoint, job.run.output)
    for index, _, _ in loaded_blocks(store):
        store.save(index, None)
    store.finish()


def _train(
    job: RecoveryJob, checkpoint: Checkpoint, watch: Stopwatch, progress: Progress
) -> NetworkReport:
    """Train the network, take the weights that held-out text prefers, and write them."""
    options = job.recovery
    blocks = load_finite(job, checkpoint.folder)
    holding = Holding(blocks)
    if options.network == "lora":
        holding = Adapted(blocks, options.rank, options.seed)
    teacher, _ = find_teacher(job, progress)
    watch.lap("teacher")
    trainer = Trainer(holding, teacher, job.text.train_WL, job.options, job.dtype)
    resumed = resume(job, trainer)
    chosen = Chosen(job.work / "chosen.safetensors", trainer.parameters)
    log = do_steps(job, trainer, progress, chosen.offer)
    assert log is not None, "recovery runs in one process"
    watch.lap("steps")
    lowest = chosen.take()
    adapters = None
    if isinstance(holding, Adapted):
        count = sum(parameter.numel() for parameter in trainer.parameters.values())
        adapters = AdaptersReport(rank=options.rank, parameters=count)
        holding.merge()
    round_to_stored(blocks, checkpoint)
    loss = trainer.validation_loss(job.text.held_out_WL)
    save(holding, checkpoint, job.run.output)
    validations = [dict(entry) for entry in log.with_key("validation_loss")]
    best = next(entry for entry in validations if entry["validation_loss"] == lowest)
    return NetworkReport(
        adapters=adapters,
        steps=trainer.done,
        tokens=trainer.done * job.options.step_tokens,
        chosen_step=int(best["step"]),
        loss=loss,
        curve=curve(log),
        validations=validations,
        resumed_steps=resumed,
    )


class Chosen:
    """Keeps the weights of the lowest held-out loss, the earliest where losses are equal.

    A resumed run offers what it had offered before it was killed once more, with the same loss,
    and so ends with the same choice.
    """

    def __init__(self, path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        self._path = path
        self._parameters = parameters
        self._lowest = float("inf")
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                self._lowest = float(file.get_tensor("loss"))

    def offer(self, loss: float) -> None:
        """Keep the weights as they are now, if their loss is lower than any before."""
        if loss < self._lowest:
            self._lowest = loss
            weights = {f"weight.{name}": each for name, each in self._parameters.items()}
            number = torch.tensor(loss, dtype=torch.float64)
            write_safetensors(self._path, {"loss": number, **weights}, sealed=True)

    def take(self) -> float:
        """Put the chosen weights into the parameters; returns their loss."""
        state = read_sealed(self._path)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[f"weight.{name}"])
        return float(state["loss"])


@contextmanager
def taken(
    name: str | Path,
    options: Recovery,
    output: Path,
    *,
    teacher: str | Path,
    data: Sequence[str],
    restart: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> Iterator[RecoveryJob]:
    """Check everything that can be checked before work starts, then hold the output folder.

    Arguments are those of ``recover``.
    """
    check_apart(output, name)
    Run.look(output, restart=restart)
    if options.network == "lora":
        check_peft()
    cut = Checkpoint.open(
        name,
        trust_remote_code=trust_remote_code,
        save_dtype=options.save_dtype,
        progress=progress,
    )
    dense = Checkpoint.open(teacher, trust_remote_code=trust_remote_code, progress=progress)
    if masks_path(cut.folder, 0).is_file():
        raise SecateurError(
            f"{cut.folder} was pruned to a mask, which recovery would fill again; use "
            "`secateur train --preset keep-mask`."
        )
    if options.blocks is not None:
        _check_alike(cut, dense)
    trained = {"lora": count_parameters(cut.blocks, options.rank), "none": 0}
    deciding = {"blocks", "block_windows", "network", "rank"}
    with training_taken(
        name,
        options.training,
        output,
        data=data,
        validation=None,
        teacher=teacher,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
        device=resolve_device(options.device),
        ranks=ALONE,
        deciding={"recovery": options.model_dump(mode="json", include=deciding)},
        trained=trained.get(options.network),
        opened=(cut, dense),
    ) as job:
        yield RecoveryJob(**vars(job), recovery=options, whole=dense)


def _check_alike(cut: Checkpoint, dense: Checkpoint) -> None:
    sizes = [(len(each.blocks), each.hidden_size) for each in (cut, dense)]
    if sizes[0] != sizes[1]:
        (blocks, width), (dense_blocks, dense_width) = sizes
        raise SecateurError(
            f"{cut.folder} has {blocks} blocks of hidden size {width} and the teacher "
            f"{dense_blocks} of {dense_width}, so none can be fitted to another; name the model "
            "that it was cut from, or leave that step out with --no-blocks."
        )
