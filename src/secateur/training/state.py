"""The state of a training run on disk: one file, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.checkpoint.files import write_safetensors
from secateur.training.masked_linear import MaskedLinear
from secateur.training.optimiser import MaskedAdamW


def write_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    linears: Sequence[MaskedLinear],
    optimiser: MaskedAdamW,
) -> None:
    """Write everything that the next step depends on.

    The order of the text follows from its seed and the step, and no step draws random numbers, so
    there is no random state.
    """
    write_safetensors(
        path,
        {
            "steps": torch.tensor(optimiser.steps),
            **{f"weight.{name}": parameter for name, parameter in parameters.items()},
            **optimiser.state(),
            **{f"mask.{each.name}": _packed(each.mask) for each in linears},
        },
    )


def read_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    linears: Sequence[MaskedLinear],
    optimiser: MaskedAdamW,
) -> None:
    """Put everything back as it was written; bit-equal."""
    state = load_file(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"weight.{name}"])
    for each in linears:
        each.mask.copy_(_unpacked(state[f"mask.{each.name}"], each.mask.shape))
    optimiser.restore(state, int(state["steps"]))


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool)).view(
        shape
    )
