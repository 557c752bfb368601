"""Load student and teacher, whole or as this process's part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.streamed import StreamedStore
from secateur.models.structure import BlockList
from secateur.models.text_path import find_blocks
from secateur.runs.progress import Progress
from secateur.training.distillation import Teacher
from secateur.training.holding import Holding
from secateur.training.job import Job
from secateur.training.sharding import Sharded
from secateur.training.start import FirstMasks, count_zeros, masked_linears, pruned_masks
from secateur.training.teacher import CachedTeacher, ResidentTeacher
from secateur.training.trainer import held_out_loss


def load_student(job: Job, folder: Path) -> Holding:
    """Load the model to be trained, fp32, with its first masks.

    Args:
        job: the run.
        folder: where the weights are: the model's own, or one that was pruned first.

    Raises:
        SecateurError: a weight is not finite, or the masks do not fit.
    """
    if job.ranks.world == 1:
        blocks = load_finite(job, folder)
        return Holding(blocks, masked_linears(blocks, _masks(job, folder, blocks), job.options))
    store = _store(job, folder, torch.float32)
    first = FirstMasks(store.blocks, _masks(job, folder, store.blocks), job.options)
    student = Sharded(
        store,
        first.of_block,
        weights=torch.float32,
        products=job.dtype,
        device=job.device,
        ranks=job.ranks,
        reduce_every_pass=job.options.reduce_every_pass,
    )
    first.check(job.ranks.total(count_zeros(student.linears)))
    return student


def load_finite(job: Job, folder: Path) -> BlockList:
    """Load a whole model to train, fp32.

    Raises:
        SecateurError: a weight is not finite.
    """
    model = job.load(folder, torch.float32)
    return replace(find_blocks(model), chosen=job.model.chosen)


def find_teacher(job: Job, progress: Progress) -> tuple[Teacher | None, float | None]:
    """The teacher and its held-out loss; a cached one has left memory."""
    if job.teacher is None:
        return None, None
    folder, options, text = job.teacher[1].folder, job.options.distillation, job.text
    # Each process asks a cached teacher about other windows, so each has it as a whole.
    if options.top_k is not None or job.ranks.world == 1:
        dense = Holding(find_blocks(job.load(folder, job.dtype)))
    else:
        dense = Sharded(
            _store(job, folder, job.dtype),
            lambda index: [],
            weights=job.dtype,
            products=job.dtype,
            device=job.device,
            ranks=job.ranks,
        )
    loss = held_out_loss(dense, text.held_out_WL, job.dtype, job.ranks)
    if options.top_k is None:
        return ResidentTeacher(dense, text.train_WL[:1], options.temperature), loss
    teacher = CachedTeacher.make(
        job.work,
        dense.model,
        text.train_WL,
        temperature=options.temperature,
        count=options.top_k,
        batch=job.options.micro_batch_windows,
        dtype=job.dtype,
        progress=progress,
        ranks=job.ranks,
    )
    return teacher, loss


def _masks(job: Job, folder: Path, blocks: BlockList) -> dict[str, Tensor]:
    return job.model.masks if folder == job.model.folder else pruned_masks(folder, blocks)


def _store(job: Job, folder: Path, dtype: torch.dtype) -> StreamedStore:
    found = Checkpoint.at(folder, trust_remote_code=job.trust_remote_code, dtype=dtype)
    found = replace(found, blocks=replace(found.blocks, chosen=job.model.chosen))
    found.blocks.model.requires_grad_(False)
    return found.store(job.device)
