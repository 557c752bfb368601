"""Which device a run computes on, and in which dtype."""

from __future__ import annotations

from typing import Literal

import torch

from secateur.runs.errors import SecateurError

DtypeName = Literal["auto", "float32", "bfloat16"]
SaveDtype = Literal["source", "float32", "bfloat16", "float16"]
SAVE_DTYPE = (
    "dtype of the saved weights, to which the model is rounded before work; source leaves"
    " it as it is"
)


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
