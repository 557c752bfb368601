"""Wall time by phase."""

from __future__ import annotations

import time

import torch


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
