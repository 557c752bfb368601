"""Which tensors of the files are linears of the blocks, and how many of their weights are zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.reader import CheckpointReader
from secateur.models.structure import ROUTERS, find_linears
from secateur.patterns.pattern import NM

_KNOWN_PATTERNS = (NM(1, 4), NM(2, 4), NM(2, 8), NM(4, 8))


class LinearCount(BaseModel):
    """Zeros of one linear as stored."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    weights: int
    patterns: list[str]

    @property
    def sparsity(self) -> float:
        """Zeros over weights."""
        return self.zeros / self.weights


class Inspection(BaseModel):
    """Zeros of all linears inside the blocks of a checkpoint."""

    folder: str
    linears: list[LinearCount]
    zeros: int
    weights: int
    sparsity: float
    patterns: list[str]


def inspect(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Count the zeros of every linear in the blocks, reading one tensor at a time.

    ``patterns`` lists the common n:m patterns (keep n of every m consecutive input columns) that
    a linear satisfies everywhere.

    Raises:
        SecateurError: the folder is no readable checkpoint of a causal language model.
    """
    found = Checkpoint.at(folder, trust_remote_code=trust_remote_code, use="read")
    linears = [_count(stored, found.reader) for stored in stored_linears(found)]
    zeros = sum(linear.zeros for linear in linears)
    weights = sum(linear.weights for linear in linears)
    return Inspection(
        folder=str(folder),
        linears=linears,
        zeros=zeros,
        weights=weights,
        sparsity=zeros / weights,
        patterns=[
            str(p) for p in _KNOWN_PATTERNS if all(str(p) in linear.patterns for linear in linears)
        ],
    )


def _count(stored: StoredLinear, reader: CheckpointReader) -> LinearCount:
    zero_OI = stored.read(reader).flatten(0, -2) == 0
    return LinearCount(
        name=stored.name,
        shape=reader.shapes[stored.name],
        zeros=int(zero_OI.sum()),
        weights=zero_OI.numel(),
        patterns=[str(pattern) for pattern in _satisfied(zero_OI, _KNOWN_PATTERNS)],
    )


def _satisfied(zero_OI: Tensor, patterns: Sequence[NM]) -> Iterator[NM]:
    rows, columns = zero_OI.shape
    for pattern in patterns:
        if columns % pattern.m:
            continue
        zeros = zero_OI.reshape(rows, -1, pattern.m).sum(-1, dtype=torch.int32)
        if bool((zeros >= pattern.m - pattern.n).all()):
            yield pattern


@dataclass(frozen=True)
class StoredLinear:
    """A tensor of the files that holds a linear, or the same linear of several experts.

    Attributes:
        name: name in the files.
        transposed: stored as (in, out).
    """

    name: str
    transposed: bool

    def read(self, reader: CheckpointReader) -> Tensor:
        """Return the mapped weight, (out, in) or (experts, out, in), in the file's dtype."""
        tensor = reader.mapped(self.name)
        return tensor.T if self.transposed else tensor


def stored_linears(checkpoint: Checkpoint) -> Iterator[StoredLinear]:
    """Name the linears in the blocks of a checkpoint, block after block."""
    reader, blocks, tensors = checkpoint.reader, checkpoint.blocks, checkpoint.mapped
    if isinstance(tensors, str):
        # Joined on loading: the parts in the files are linears of their own.
        for name, shape in reader.shapes.items():
            if (
                f"{blocks.prefix}." in name
                and len(shape) >= 2
                and name.removesuffix(".weight").rpartition(".")[2] not in ROUTERS
            ):
                yield StoredLinear(name, transposed=False)
        return
    for block, names in zip(blocks, tensors.blocks, strict=True):
        for linear in find_linears(block):
            yield StoredLinear(names[f"{linear.name}.weight"], linear.transposed)
        for file_name in names.values():
            if len(reader.shapes[file_name]) == 3:
                yield StoredLinear(file_name, transposed=False)
