"""The masks of a checkpoint on disk: one bit per weight, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.models.experts import unstacked_experts
from secateur.models.store import BlockStore
from secateur.models.structure import find_linears
from secateur.patterns.pattern import Unstructured
from secateur.patterns.plan import Plan
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_safetensors


def masks_path(output: Path, index: int) -> Path:
    """Where the masks of a block are kept beside the checkpoint."""
    return output / "secateur" / "masks" / f"block-{index:03d}.safetensors"


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write bool masks (O, I) as uint8 (O, ceil(I/8)), first column in the highest bit."""
    packed = {
        name: torch.from_numpy(np.packbits(mask_OI.cpu().numpy(), axis=1))
        for name, mask_OI in masks.items()
    }
    write_safetensors(path, packed)


def read_masks(path: Path, columns: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the bool masks (O, I) of a file, ``columns`` giving I by name, 0 for others."""
    return {
        name: torch.from_numpy(
            np.unpackbits(bits.numpy(), axis=1, count=columns.get(name, 0)).astype(bool)
        )
        for name, bits in load_file(path).items()
    }


def block_masks(folder: Path, index: int, block: nn.Module) -> dict[str, Tensor] | None:
    """Masks (True = kept) of a block's linears by name inside it, None if it has no file.

    A linear that was left as it was has none.

    Raises:
        SecateurError: the file holds masks of other linears.
    """
    path = masks_path(folder, index)
    if not path.is_file():
        return None
    shapes = {linear.name: tuple(linear.weight_OI.shape) for linear in find_linears(block)}
    masks = read_masks(path, {name: shape[1] for name, shape in shapes.items()})
    if any(shapes.get(name) != tuple(mask_OI.shape) for name, mask_OI in masks.items()):
        raise SecateurError(
            f"{path} holds masks of other linears than the checkpoint beside it; remove it, or "
            "fetch the checkpoint again."
        )
    return masks


class KeptMasks:
    """Masks beside a pruned checkpoint; where it has none, its zeros.

    Args:
        folder: the checkpoint, None for a model in memory, whose zeros count.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def files(self, blocks: int) -> list[Path]:
        """The mask files that are there."""
        if self._folder is None:
            return []
        paths = (masks_path(self._folder, index) for index in range(blocks))
        return [path for path in paths if path.is_file()]

    def of(self, index: int, block: nn.Module) -> Mapping[str, Tensor] | None:
        """Masks (True = kept) of the block's linears by name inside it, None if it has no file."""
        masks = None if self._folder is None else block_masks(self._folder, index, block)
        if masks is None:
            return None
        # What was left as it was keeps all of its weights.
        whole = {
            linear.name: torch.ones(linear.weight_OI.shape, dtype=torch.bool)
            for linear in find_linears(block)
            if linear.name not in masks
        }
        return masks | whole

    def plan(self, store: BlockStore) -> Plan:
        """Count what is removed already; blocks without masks are read once."""
        weights: dict[str, int] = {}
        zeros: dict[str, int] = {}
        for index in range(len(store.blocks)):
            block = store.blocks[index]
            with unstacked_experts(block):
                masks = self.of(index, block)
            loaded = block if masks is not None else store.load(index)
            with unstacked_experts(loaded):
                for linear in store.blocks.linears(index):
                    name = f"{store.blocks.name(index)}.{linear.name}"
                    kept_OI = linear.weight_OI != 0 if masks is None else masks[linear.name]
                    weights[name] = kept_OI.numel()
                    zeros[name] = kept_OI.numel() - int(kept_OI.sum())
            if masks is None:
                store.release(index)
        return Plan(Unstructured(sum(zeros.values()) / sum(weights.values())), weights, zeros)
