"""Which number formats the walk computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from secateur.errors import SecateurError

DtypeName = Literal["auto", "float32", "bfloat16"]


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        SecateurError: the name is none of these, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or name == kind):
        raise SecateurError(f"{name} is no device; use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise SecateurError(
            f"There is no device {name}, the machine has {torch.cuda.device_count()} of CUDA; "
            "use cpu or auto."
        )
    return torch.device(name)


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes; ``auto`` is bf16 where the device is made for it.

    Raises:
        SecateurError: the name is not known.
    """
    if name == "auto":
        fast = (
            torch.cuda.is_bf16_supported()
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return torch.bfloat16 if fast else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise SecateurError(f"{name} is no dtype of forward passes; use auto, {', '.join(known)}.")
    return known[name]


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
