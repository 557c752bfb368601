"""The state of a training run on disk: one folder, whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from secateur.runs.files import check_folder, move_folder, write_safetensors, writing
from secateur.training.ranks import Ranks
from secateur.training.trainer import Trainer


def write_state(work: Path, trainer: Trainer, ranks: Ranks) -> None:
    """Write everything that the next step depends on, in place of the state before it.

    The order of the text follows from its seed and the step, and no step draws random numbers, so
    there is no random state. Several processes write what each of them holds, as safetensors.
    """
    part, whole = work / "state.part", work / f"state-{trainer.done:08d}"
    before = states(work)
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.wait()
    if ranks.world == 1:
        write_safetensors(part / "state.safetensors", _tensors(trainer))
    else:
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        with writing(part):
            save(_tensors(trainer), storage_writer=writer)
    if ranks.first:
        # Nothing is there under this name: a run goes on from the latest state.
        with writing(whole):
            move_folder(part, whole)
        for path in before:
            shutil.rmtree(path)
    ranks.wait()


def read_state(work: Path, trainer: Trainer, ranks: Ranks) -> None:
    """Put everything back as it was written, if it was; by any number of processes."""
    found = states(work)
    if not found:
        return
    if ranks.first:
        check_folder(found[-1])
    reader = HuggingFaceStorageReader(str(found[-1]))
    trainer.go_on_from(int(found[-1].name.removeprefix("state-")))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(_tensors(trainer), storage_reader=reader, no_dist=ranks.world == 1)


def states(work: Path) -> list[Path]:
    """Folders of states, the latest last."""
    return sorted(work.glob("state-*"))


@torch.no_grad()
def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the state, sharing memory with the trainer's."""
    place = trainer.holding.global_tensor
    weights = {f"weight.{name}": place(name, p.data) for name, p in trainer.parameters.items()}
    moments = {
        name: place(name.partition(".")[2], tensor)
        for name, tensor in trainer.optimiser.state().items()
    }
    masks = {
        f"mask.{each.name}": place(f"{each.name}.weight", each.mask.view(torch.uint8))
        for each in trainer.linears
    }
    sums = {} if trainer.splitting is None else trainer.splitting.sums
    split = {f"sum.{name}": place(f"{name}.weight", tensor) for name, tensor in sums.items()}
    return weights | moments | masks | split
