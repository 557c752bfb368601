"""Masks on disk: one bit per weight, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.checkpoint.files import write_safetensors


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write bool masks (O, I) as uint8 (O, ceil(I/8)), first column in the highest bit."""
    packed = {
        name: torch.from_numpy(np.packbits(mask_OI.cpu().numpy(), axis=1))
        for name, mask_OI in masks.items()
    }
    write_safetensors(path, packed)


def read_masks(path: Path, columns: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the bool masks (O, I) of a file, ``columns`` giving I for every name."""
    return {
        name: torch.from_numpy(
            np.unpackbits(bits.numpy(), axis=1, count=columns[name]).astype(bool)
        )
        for name, bits in load_file(path).items()
    }
