"""What a session of a run costs: wall time by phase, peak memory, the machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from secateur.runs.machine import describe_machine, peak_device_memory, peak_memory


class Stopwatch:
    """Adds up wall time by phase, waiting for the device where there is one."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under ``phase``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now


class Meter(Stopwatch):
    """The stopwatch of a whole session, which also knows its memory."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._phases: dict[str, float] = {}
        super().__init__(self._phases, device)

    def costs(self) -> dict[str, Any]:
        """The fields that every report has for them."""
        phases = {phase: round(seconds, 3) for phase, seconds in self._phases.items()}
        return {
            "seconds": phases | {"total": round(sum(self._phases.values()), 3)},
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": peak_device_memory(self._device),
            "machine": describe_machine(self._device),
        }
