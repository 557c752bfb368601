"""Linears with a derivative of their own, under autocast as any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def apply_linear(
    function: type[Function], x: Tensor, *others: Any, bias_O: Tensor | None = None
) -> Tensor:
    """Apply a function to inputs, in autocast's dtype if there is one, and add a bias."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    apply: Callable[..., Tensor] = function.apply
    y = apply(x, *others)
    return y if bias_O is None else y + bias_O.to(y.dtype)
