"""The machine that a run takes place on: processor, versions, peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import version

import torch
from pydantic import BaseModel


class Machine(BaseModel):
    """Where the run took place."""

    processor: str
    cores: int
    device: str
    python: str
    versions: dict[str, str]


def describe_machine(device: torch.device) -> Machine:
    """Describe the machine a run takes place on."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        python=platform.python_version(),
        versions=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results."""
    return {name: version(name) for name in ("secateur", "torch", "transformers", "safetensors")}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        # What `getrusage` says begins with the size of the process that started this one.
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """Largest memory allocated on the device so far, bytes; None without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
