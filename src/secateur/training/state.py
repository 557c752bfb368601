"""The state of a training run on disk: one folder, whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from secateur.runs.files import check_folder, move_folder, write_safetensors, writing
from secateur.training.ranks import Ranks


def write_state(work: Path, step: int, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write the state behind a step in place of the one before it.

    Several processes write what each of them holds, as safetensors.
    """
    part, whole = work / "state.part", work / f"state-{step:08d}"
    before = states(work)
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.wait()
    if ranks.world == 1:
        write_safetensors(part / "state.safetensors", state)
    else:
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        with writing(part):
            save(dict(state), storage_writer=writer)
    if ranks.first:
        # Nothing is there under this name: a run goes on from the latest state.
        with writing(whole):
            move_folder(part, whole)
        for path in before:
            shutil.rmtree(path)
    ranks.wait()


def read_state(work: Path, state: Mapping[str, Tensor], ranks: Ranks) -> int:
    """Put everything back as it was written, by any number of processes.

    Returns:
        The step behind which that was; 0 if no state was written.
    """
    found = states(work)
    if not found:
        return 0
    if ranks.first:
        check_folder(found[-1])
    reader = HuggingFaceStorageReader(str(found[-1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(state), storage_reader=reader, no_dist=ranks.world == 1)
    return int(found[-1].name.removeprefix("state-"))


def states(work: Path) -> list[Path]:
    """Folders of states, the latest last."""
    return sorted(work.glob("state-*"))
