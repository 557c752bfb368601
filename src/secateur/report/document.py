"""The content of ``report.json``."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from math import isnan
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from secateur.walk.walk import WalkedBlock

SCHEMA = 1


class LinearReport(BaseModel):
    """One linear after pruning."""

    zeros: int = Field(description="zeros, counted in the mask")
    rounded_to_zero: int = Field(0, description="kept weights that quantisation rounded to zero")
    weights: int
    sparsity: float
    rows: list[int] = Field(
        description="rows by their own sparsity, in ten equal classes from 0 to 1"
    )
    relative_error: float | None = Field(
        description="squared output error over squared output, on held-out tokens"
    )


class BlockReport(BaseModel):
    """One block after pruning."""

    index: int
    held_out_error: float = Field(
        description="error of the block's hidden states against the dense block's on the same "
        "input, direction more than length, mean over held-out tokens"
    )
    linears: dict[str, LinearReport]
    notes: list[str] = Field(description="fallbacks used and updates rejected")
    seconds: dict[str, float] = Field(description="wall time by phase")


class SparsityReport(BaseModel):
    """Zeros of the linears in all blocks."""

    target: float
    zeros: int
    weights: int
    counted: float = Field(description="zeros over weights, counted in the saved files")
    rounded_to_zero: int = Field(
        0, description="of the zeros, kept weights that quantisation rounded to zero"
    )


class Machine(BaseModel):
    """Where the run took place."""

    processor: str
    cores: int
    device: str
    python: str
    versions: dict[str, str]


class Report(BaseModel):
    """Everything about a finished run."""

    schema_version: int = SCHEMA
    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    forward_dtype: str
    streamed: bool = Field(description="one block in memory; else the whole model was")
    sparsity: SparsityReport
    blocks: list[BlockReport]
    seconds: dict[str, float] = Field(description="wall time by phase, this session")
    resumed_blocks: int = Field(description="blocks that an earlier, interrupted session finished")
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    machine: Machine
    notes: list[str]


def describe_block(walked: WalkedBlock) -> BlockReport:
    """Put a walked block into the report's terms."""
    pruned = walked.pruned
    return BlockReport(
        index=walked.index,
        held_out_error=walked.held_out_error,
        linears={
            name: LinearReport(
                zeros=(zeros := mask_OI.numel() - int(mask_OI.sum())),
                rounded_to_zero=pruned.rounded_to_zero.get(name, 0),
                weights=mask_OI.numel(),
                sparsity=zeros / mask_OI.numel(),
                rows=_row_classes(mask_OI),
                relative_error=None if isnan(pruned.errors[name]) else pruned.errors[name],
            )
            for name, mask_OI in pruned.masks.items()
        },
        notes=pruned.notes,
        seconds={phase: round(value, 3) for phase, value in pruned.seconds.items()},
    )


def _row_classes(mask_OI: Tensor) -> list[int]:
    sparsity_O = 1 - mask_OI.sum(1) / mask_OI.shape[1]
    classes: list[int] = (sparsity_O * 10).long().clamp_(0, 9).bincount(minlength=10).tolist()
    return classes


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
