"""Load student and teacher, whole or as this process's part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.store import check_finite
from secateur.models.streamed import StreamedStore
from secateur.models.structure import BlockList, find_blocks
from secateur.runs.errors import SecateurError
from secateur.training.holding import Holding, Whole
from secateur.training.job import Job
from secateur.training.sharding import Sharded
from secateur.training.start import (
    check_zeros,
    count_zeros,
    first_plan,
    masked_linears,
    masked_linears_of,
    pruned_masks,
)


def load_student(job: Job, folder: Path) -> Holding:
    """Load the model to be trained, fp32, with its first masks.

    Args:
        job: the run.
        folder: where the weights are: the model's own, or one that was pruned first.

    Raises:
        SecateurError: a weight is not finite, or the masks do not fit.
    """
    options = job.options
    if job.ranks.world == 1:
        blocks = find_blocks(job.load(folder, torch.float32))
        masks = _masks(job, folder, blocks)
        for index, block in enumerate(blocks):
            check_finite(block.state_dict(), blocks.name(index))
        return Whole(blocks, masked_linears(blocks, masks, options))
    store = _store(job, folder, torch.float32)
    plan, masks = first_plan(store.blocks, options), _masks(job, folder, store.blocks)
    generator = torch.Generator().manual_seed(options.seed)
    student = Sharded(
        store,
        lambda index: masked_linears_of(store.blocks, index, plan, masks, options, generator),
        weights=torch.float32,
        products=job.dtype,
        device=job.device,
        ranks=job.ranks,
        reduce_every_pass=options.reduce_every_pass,
    )
    check_zeros(job.ranks.total(count_zeros(student.linears)), plan, options.keeps_mask)
    return student


def load_teacher(job: Job, folder: Path) -> Holding:
    """Load the dense model in the dtype of products."""
    if job.ranks.world == 1:
        return Whole(find_blocks(job.load(folder, job.dtype)), [])
    return Sharded(
        _store(job, folder, job.dtype),
        lambda index: [],
        weights=job.dtype,
        products=job.dtype,
        device=job.device,
        ranks=job.ranks,
    )


def _masks(job: Job, folder: Path, blocks: BlockList) -> dict[str, Tensor]:
    return job.model.masks if folder == job.model.folder else pruned_masks(folder, blocks)


def _store(job: Job, folder: Path, dtype: torch.dtype) -> StreamedStore:
    found = Checkpoint.at(folder, trust_remote_code=job.trust_remote_code, dtype=dtype)
    if isinstance(found.mapped, str):
        raise SecateurError(
            f"{folder} cannot be divided among processes: {found.mapped}; let its teaching be "
            "cached with --top-k."
        )
    found.blocks.model.requires_grad_(False)
    return found.store(job.device)
