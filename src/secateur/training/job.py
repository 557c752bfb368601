"""What a training run works on, checked before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.models.checkpoint import Checkpoint
from secateur.models.locate import find_folder, load_model, load_tokenizer
from secateur.models.selection import choose_linears
from secateur.models.structure import check_length, embedding_rows
from secateur.runs.device import resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.files import cache_folder, fingerprint_files
from secateur.runs.progress import Progress
from secateur.runs.run import Run, check_apart, check_space, decides
from secateur.text.encoder import Encoder
from secateur.text.sources import HubDataset, find_texts, resolve_source
from secateur.text.training import TrainingText, load_text
from secateur.training.distillation import cache_bytes
from secateur.training.log import check_tensorboard
from secateur.training.options import Training
from secateur.training.ranks import Ranks
from secateur.training.start import check_model, check_shardable, named_linears, pruned_masks

# Below the run's folder: what only an unfinished run needs, larger than the model.
TEMPORARY = (
    "training/state*",
    "training/targets-*",
    "training/start",
    "training/chosen.safetensors",
    "blocks",
)


@dataclass(frozen=True)
class Model:
    """A checkpoint that can be trained.

    Attributes:
        name: as the user named it.
        checkpoint: where it lies, and what is in it.
        masks: by full linear name, if it was pruned by this package.
    """

    name: str
    checkpoint: Checkpoint
    masks: dict[str, Tensor]

    @property
    def chosen(self) -> frozenset[str] | None:
        """Full names of the linears that get masks; all if None."""
        return self.checkpoint.blocks.chosen

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder


@dataclass(frozen=True)
class Job:
    """A run whose inputs have been checked.

    Attributes:
        model: to be trained.
        teacher: name and checkpoint of the dense model, or None.
        options: what to do.
        encoder: of the model.
        text: windows of tokens.
        run: the output folder.
        device: where to compute.
        dtype: of forward passes.
        trust_remote_code: let the checkpoint's own Python code run.
        ranks: the processes of the run.
    """

    model: Model
    teacher: tuple[str, Checkpoint] | None
    options: Training
    encoder: Encoder
    text: TrainingText
    run: Run
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    ranks: Ranks

    @property
    def prunes_first(self) -> bool:
        """Whether a pruned checkpoint to start from has to be made."""
        return self.options.start == "auto" and not self.model.masks

    @property
    def dense(self) -> Checkpoint:
        """The dense model: the teacher, if there is one."""
        return self.model.checkpoint if self.teacher is None else self.teacher[1]

    @property
    def work(self) -> Path:
        """Where the run keeps what it needs to go on."""
        return work_folder(self.run.output)

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Read a whole model onto the device."""
        trust = self.trust_remote_code
        model = load_model(folder, dtype, self.device, trust_remote_code=trust)
        model.requires_grad_(False)
        return model


def work_folder(output: Path) -> Path:
    """Where a training run keeps its text, state, log and cached targets."""
    return output / "secateur" / "training"


@contextmanager
def taken(
    name: str | Path,
    options: Training,
    output: Path,
    *,
    data: Sequence[str],
    validation: str | None,
    teacher: str | Path | None,
    restart: bool,
    trust_remote_code: bool,
    progress: Progress,
    device: torch.device,
    ranks: Ranks,
    deciding: Mapping[str, Any] | None = None,
    trained: int | None = None,
    opened: tuple[Checkpoint, Checkpoint] | None = None,
) -> Iterator[Job]:
    """Check everything that can be checked before work starts, then hold the output folder.

    Arguments are those of ``train``. ``deciding`` is what else decides the bytes of the result,
    and ``trained`` how many parameters are trained, all of the model's if None. ``opened`` are the
    model and its teacher, where they have been opened. The first process of a run holds the
    folder; the others join it.
    """
    path = work_folder(output) / "text.safetensors"
    check_apart(output, name)
    earlier = Run.look(output, restart=restart) if ranks.first else None
    check_tensorboard(options.log_to)
    dtype = resolve_dtype(options.dtype, device)
    found = (
        opened[0]
        if opened
        else Checkpoint.open(
            name,
            trust_remote_code=trust_remote_code,
            save_dtype=options.save_dtype,
            progress=progress,
        )
    )
    model = _check_model(str(name), found, options, ranks)
    ranks.share(options.step_windows)
    named = _find_teacher(
        model, options, teacher, opened[1] if opened else None, trust_remote_code, progress
    )
    if options.starts_by_covariance and named is None and model.masks:
        raise SecateurError(
            f"{model.folder} is pruned, and a low-rank start by covariance needs the dense model; "
            "train with it as --teacher, or start from means."
        )
    parts = find_texts(data)
    own = None if validation is None else resolve_source(validation)
    if ranks.first and not (earlier and earlier.complete):
        _check_space(model, named, options, output, trained)
    tokenizer = load_tokenizer(model.folder, trust_remote_code=trust_remote_code)
    rows = embedding_rows(model.checkpoint.blocks.model)
    encoder = Encoder.of(tokenizer, options.bos, rows)
    # Text that is too short or unreadable must show before the folder is taken.
    text = None
    if ranks.first and (restart or earlier is None or not earlier.text):
        text = load_text(
            parts,
            encoder,
            windows=options.steps * options.step_windows,
            held_out=options.validation_windows,
            length=options.length,
            seed=options.seed,
            validation=own,
            cache=cache_folder() / "tokens",
            progress=progress,
        )
    fingerprint = decides(
        model=model.checkpoint.reader.fingerprint(),
        teacher=None if named is None else named[1].reader.fingerprint(),
        options=_deciding_options(options) | {"bos": encoder.bos},
        text=[[part.weight, *map(_identity, part.sources)] for part in parts],
        **{"validation text": None if own is None else _identity(own)},
        forward=f"{dtype} on {device.type}",
        **(deciding or {}),
    )
    with Run.take(output, fingerprint, restart=restart, joins=not ranks.first) as run:
        if text is not None and not run.has(path):
            text.write(path)
            facts = {"tokens": text.train_WL.numel(), "bos": encoder.bos, "parts": text.parts}
            run.keep([path], text=facts)
        yield Job(
            model,
            named,
            options,
            encoder,
            TrainingText.read(path),
            run,
            device,
            dtype,
            trust_remote_code,
            ranks,
        )


def _check_model(name: str, checkpoint: Checkpoint, options: Training, ranks: Ranks) -> Model:
    masks = pruned_masks(checkpoint.folder, checkpoint.blocks)
    # What pruning left as it was has no mask, and gets none.
    known = replace(checkpoint.blocks, chosen=frozenset(masks) if masks else None)
    blocks = choose_linears(known, options.only, options.skip)
    check_model(blocks, options)
    check_shardable(options, named_linears(blocks), ranks)
    check_length(blocks.model.config, options.length, "Training")
    return Model(name, replace(checkpoint, blocks=blocks), masks)


def _find_teacher(
    model: Model,
    options: Training,
    teacher: str | Path | None,
    opened: Checkpoint | None,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[str, Checkpoint] | None:
    if options.distillation.weight == 0:
        return None
    if teacher is None:
        if model.masks or options.keeps_mask:
            raise SecateurError(
                f"{model.folder} is pruned, and a teacher should not be; name the dense model with "
                "--teacher, or train on the text alone with a distillation weight of 0."
            )
        return model.name, model.checkpoint
    found = opened or Checkpoint.at(
        find_folder(teacher, progress), trust_remote_code=trust_remote_code
    )
    check_length(found.blocks.model.config, options.length, "The teacher's training")
    _check_vocabularies(model.checkpoint, found, trust_remote_code)
    return str(teacher), found


def _identity(source: Path | HubDataset) -> str:
    return fingerprint_files([source]) if isinstance(source, Path) else source.label("train")


def _deciding_options(options: Training) -> dict[str, Any]:
    """The options that change the bytes of the result; resolved ones are recorded apart."""
    values = options.model_dump(mode="json")
    for name in (
        *("device", "dtype", "checkpoint_minutes", "log_to"),
        # How it is computed changes no more than the rounding of sums.
        *("activation_checkpointing", "reduce_every_pass"),
    ):
        values.pop(name)
    return values


def _check_vocabularies(student: Checkpoint, teacher: Checkpoint, trust_remote_code: bool) -> None:
    found = [
        (
            each.blocks.model.config.get_text_config().vocab_size,
            load_tokenizer(each.folder, trust_remote_code=trust_remote_code).get_vocab(),
        )
        for each in (student, teacher)
    ]
    if found[0] != found[1]:
        raise SecateurError(
            f"The teacher {teacher.folder} has another vocabulary than {student.folder}; name the "
            "dense model that it was made from."
        )


def _check_space(
    model: Model,
    teacher: tuple[str, Checkpoint] | None,
    options: Training,
    output: Path,
    trained: int | None,
) -> None:
    """Find out now, not hours later, that states and checkpoint will not fit on the disk."""
    reader = model.checkpoint.reader
    if trained is None:
        trained = sum(torch.Size(shape).numel() for shape in reader.shapes.values())
    prunes_first = options.start == "auto" and not model.masks
    # Weights and two moments in fp32, masks; and a new state is whole before the old one goes.
    need = 2 * 13 * trained + reader.bytes_of(reader.files) * (1 + prunes_first)
    if options.distillation.top_k is not None and teacher is not None:
        windows = options.steps * options.step_windows
        need += cache_bytes(windows, options.length, options.distillation.top_k)
    present = work_folder(output).rglob("*.safetensors")
    check_space(output, need, present, "Training")
