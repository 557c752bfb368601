"""Which tensors of a checkpoint's files are linears of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.architecture import find_blocks, find_linears
from secateur.architecture.linears import ROUTERS
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.skeleton import build_skeleton, map_tensors


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


def stored_linears(
    folder: Path, reader: CheckpointReader, *, trust_remote_code: bool = False
) -> Iterator[StoredLinear]:
    """Name the linears in the blocks of a checkpoint, block after block.

    Raises:
        SecateurError: the folder is no readable checkpoint of a causal language model.
    """
    skeleton = build_skeleton(folder, trust_remote_code=trust_remote_code, packed=True)
    blocks = find_blocks(skeleton)
    tensors = map_tensors(blocks, reader)
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
