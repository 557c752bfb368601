"""Calibration text of a run: read before the folder is taken, kept in it, read back on resuming."""

from __future__ import annotations

from collections.abc import Callable

from safetensors.torch import load_file

from secateur.runs.files import write_safetensors
from secateur.runs.run import Manifest, Run
from secateur.text.calibration import Calibration
from secateur.text.options import CalibrationOptions
from secateur.text.sources import SELF


def calibrate_first(
    earlier: Manifest | None, options: CalibrationOptions, draw: Callable[[], Calibration]
) -> Calibration | None:
    """Draw text that needs no model, so that unreadable text never takes the output folder.

    Args:
        earlier: of the run that began in the folder, if one did.
        options: where the text comes from.
        draw: reads it.

    Returns:
        The text; None if an earlier session has kept it, or if the model has to write it.
    """
    if SELF in options.shares or (earlier is not None and earlier.text):
        return None
    return draw()


def calibrate_once(
    run: Run | None, first: Calibration | None, draw: Callable[[], Calibration]
) -> Calibration:
    """Return the text that an earlier session kept, or else keep what was drawn first or now."""
    saved = None if run is None else run.folder / "calibration.safetensors"
    if run is not None and saved is not None and run.has(saved):
        return Calibration(load_file(saved)["tokens"], run.manifest.text)
    calibration = draw() if first is None else first
    if run is not None and saved is not None:
        write_safetensors(saved, {"tokens": calibration.tokens})
        run.keep([saved], text=calibration.description)
    return calibration
