"""Number formats of forward passes and matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def forward_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context for forward passes: matrix products in ``dtype``, the rest in fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@contextmanager
def products_of_bfloat16(device: torch.device) -> Iterator[None]:
    """Let fp32 matrix products use the bf16 or TF32 units.

    The units round their operands to bf16 (on CUDA to TF32) and sum in fp32: what a bf16 forward
    does to the inputs of its linears anyway. Operands that hold bf16 values lose nothing.
    """
    backends: Any = torch.backends
    settings = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    fast = "tf32" if device.type == "cuda" else "bf16"
    before = settings.fp32_precision
    settings.fp32_precision = fast
    try:
        yield
    finally:
        settings.fp32_precision = before
