"""A checkpoint on disk whose headers and configuration have been looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.models.locate import locate_checkpoint
from secateur.models.reader import CheckpointReader
from secateur.models.skeleton import TensorMap, build_skeleton, map_tensors
from secateur.models.streamed import StreamedStore
from secateur.models.structure import BlockList, find_blocks
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import GridOptions


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint; no weights are in memory.

    Attributes:
        folder: where it lies.
        reader: its tensors.
        blocks: its structure, with parameters on the meta device.
        mapped: which tensor of the files belongs where, or a phrase that says why none can be
            read without loading the whole model.
    """

    folder: Path
    reader: CheckpointReader
    blocks: BlockList
    mapped: TensorMap | str

    @classmethod
    def open(
        cls, name: str | Path, *, trust_remote_code: bool = False, by_block: bool = True
    ) -> Checkpoint:
        """Look at a checkpoint in a folder or on the hub.

        Args:
            name: folder or name on the hub.
            trust_remote_code: let the checkpoint's own Python code run.
            by_block: refuse one that cannot be read block by block.

        Raises:
            SecateurError: it cannot be read, or not as asked.
        """
        folder = locate_checkpoint(name, trust_remote_code=trust_remote_code)
        found = cls.at(folder, trust_remote_code=trust_remote_code)
        if by_block and isinstance(found.mapped, str):
            raise SecateurError(
                f"{folder} cannot be read block by block: {found.mapped}; save the model anew with "
                "transformers if that stores its tensors plainly."
            )
        return found

    @classmethod
    def at(
        cls, folder: Path, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
    ) -> Checkpoint:
        """Look at a folder that is known to hold a checkpoint; arguments of ``build_skeleton``."""
        reader = CheckpointReader(folder)
        model = build_skeleton(folder, trust_remote_code=trust_remote_code, dtype=dtype)
        blocks = find_blocks(model)
        return cls(folder, reader, blocks, map_tensors(blocks, reader))

    @property
    def tensors(self) -> TensorMap:
        """Which tensor of the files belongs where, of a checkpoint that can be read by block."""
        assert not isinstance(self.mapped, str), "it can be read by block"
        return self.mapped

    def store(
        self,
        device: torch.device,
        output: Path | None = None,
        packing: GridOptions | None = None,
    ) -> StreamedStore:
        """Give out its blocks one at a time; arguments of ``StreamedStore``."""
        return StreamedStore(self.blocks, self.reader, self.tensors, output, device, packing)

    @property
    def hidden_size(self) -> int:
        """Width of what blocks hand on."""
        return int(self.blocks.model.config.get_text_config().hidden_size)
