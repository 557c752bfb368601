"""Hidden states of all calibration sequences, in memory or in a mapped file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from secateur.runs.files import writing


def memory_budget(gigabytes: float | None) -> int:
    """Bytes that streams may take in memory: as asked for, or half of what is free if None."""
    if gigabytes is None:
        return psutil.virtual_memory().available // 2
    return int(gigabytes * 1e9)


def allocate(
    shape: tuple[int, ...],
    folder: Path | None,
    budget: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return an uninitialised CPU tensor for a stream of activations.

    Args:
        shape: (sequences, length, hidden).
        folder: where a mapped file may be put; the system's temporary folder if None.
        budget: bytes the stream may take in memory; beyond them it is a mapped file.
        dtype: of its numbers.
    """
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= budget:
        return torch.empty(shape, dtype=dtype)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-", delete=True) as file,
        writing(Path(file.name)),
    ):
        # If the space were not reserved, a full disk would end the process at some later write.
        _reserve(file.fileno(), size * dtype.itemsize)
        # The name goes when the context ends and the mapping keeps the bytes, so a killed run
        # leaves no file behind.
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
