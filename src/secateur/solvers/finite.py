"""Refuse numbers that would spoil a solution without a word."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.runs.errors import SecateurError


def check_finite(name: str, values: Tensor) -> None:
    """Raise SecateurError if a tensor holds NaN or infinity."""
    if values.numel() and not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
        raise SecateurError(
            f"{name} hold NaN or infinite values; check the checkpoint and the calibration dtype"
        )
