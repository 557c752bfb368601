"""Calibration text that an interrupted run has drawn already."""

from __future__ import annotations

from collections.abc import Callable

from safetensors.torch import load_file

from secateur.runs.files import write_safetensors
from secateur.runs.run import Run
from secateur.text.calibration import Calibration


def calibrate_once(run: Run | None, draw: Callable[[], Calibration]) -> Calibration:
    """Return the text that an earlier session of the run drew, or draw and keep it."""
    if run is None:
        return draw()
    saved = run.folder / "calibration.safetensors"
    if saved.is_file() and run.calibration:
        return Calibration(load_file(saved)["tokens"], run.calibration)
    calibration = draw()
    write_safetensors(saved, {"tokens": calibration.tokens})
    run.record_calibration(calibration.description)
    return calibration
