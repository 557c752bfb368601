"""Which tensors of the files are linears of the blocks, and how many of their weights are zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import stored_weights
from secateur.patterns.pattern import NM
from secateur.runs.errors import SecateurError

# Weights of a dense linear are seldom zero; more than this share of them is worth a word.
TRACE = 0.001
_KNOWN_PATTERNS = (NM(1, 4), NM(2, 4), NM(2, 8), NM(4, 8))
# Quantised formats, the multiple that they ask for, and whether rows count as well as columns.
_FORMATS = (
    ("llama.cpp Q8_0, Q4_0 and others in blocks of 32", 32, False),
    ("llama.cpp K-quants", 256, False),
    ("vLLM int4 kernels", 32, True),
)


class FormatFit(BaseModel):
    """How many linears have a shape that a quantised format holds.

    Runtimes store what does not fit in a larger format or refuse it.
    """

    name: str
    multiple: int
    fit: int
    linears: int


def format_fits(shapes: Iterable[tuple[int, ...]]) -> list[FormatFit]:
    """Which formats hold linears of these shapes, (out, in) or (experts, out, in).

    Those of llama.cpp cut a row of ``in`` weights into blocks; kernels of vLLM ask for the same of
    ``out``. Linears without weights are left out.
    """
    present = [shape[-2:] for shape in shapes if 0 not in shape]
    found = []
    for name, multiple, rows_count in _FORMATS:
        fit = sum(
            columns % multiple == 0 and not (rows_count and rows % multiple)
            for rows, columns in present
        )
        found.append(FormatFit(name=name, multiple=multiple, fit=fit, linears=len(present)))
    return found


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
    dense: int
    pruned_sparsity: float
    pruned_patterns: list[str]
    formats: list[FormatFit]


def inspect(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Count the zeros of every linear in the blocks, reading one tensor at a time.

    ``patterns`` lists the common n:m patterns (keep n of every m consecutive input columns) that
    a linear satisfies everywhere. ``dense`` counts the linears with no more than a trace of zeros,
    and ``pruned_sparsity`` and ``pruned_patterns`` are those of the others. ``formats`` says which
    quantised formats the shapes fit.

    Raises:
        SecateurError: the folder is no readable checkpoint of a causal language model.
    """
    found = Checkpoint.at(folder, trust_remote_code=trust_remote_code, use="read")
    linears = [
        _count(name, found.reader.shapes[name], weight) for name, weight in stored_linears(found)
    ]
    if not linears:
        raise SecateurError(f"The blocks of {folder} have no linears whose zeros could be counted.")
    zeros = sum(linear.zeros for linear in linears)
    weights = sum(linear.weights for linear in linears)
    pruned = [linear for linear in linears if linear.sparsity > TRACE]
    kept = sum(linear.weights for linear in pruned)
    return Inspection(
        folder=str(folder),
        linears=linears,
        zeros=zeros,
        weights=weights,
        sparsity=zeros / weights,
        patterns=_common(linears),
        dense=len(linears) - len(pruned),
        pruned_sparsity=sum(linear.zeros for linear in pruned) / kept if kept else 0.0,
        pruned_patterns=_common(pruned),
        formats=format_fits(linear.shape for linear in linears),
    )


def _common(linears: Sequence[LinearCount]) -> list[str]:
    """Patterns that all of some linears have; none if there are none."""
    if not linears:
        return []
    return [str(p) for p in _KNOWN_PATTERNS if all(str(p) in each.patterns for each in linears)]


def _count(name: str, shape: tuple[int, ...], weight: Tensor) -> LinearCount:
    zero_OI = weight.flatten(0, -2) == 0
    return LinearCount(
        name=name,
        shape=shape,
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


def stored_linears(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Give the linears in the blocks of a checkpoint, block after block: name and mapped weight.

    They are those that pruning plans. The name is that in the files, the weight (out, in) in their
    dtype; or (experts, out, in), where a tensor holds the same linear of several experts.
    """
    reader, blocks = checkpoint.reader, checkpoint.blocks
    for block, part in zip(blocks, checkpoint.tensors.blocks, strict=True):
        for name, layout in stored_weights(block).items():
            file = part.file_of(name)
            if file is not None:
                yield file, layout(reader.mapped(file))
                continue
            # Joined on loading: the parts in the files are linears of their own.
            yield from ((each, reader.mapped(each)) for each in part.files_of(name))
