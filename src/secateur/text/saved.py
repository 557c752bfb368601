"""Calibration text of a run: read before the folder is taken, kept in it, read back on resuming."""

from __future__ import annotations

from collections.abc import Callable

from safetensors.torch import load_file

from secateur.runs.files import write_safetensors
from secateur.runs.progress import Progress
from secateur.runs.run import Manifest, Run
from secateur.text.calibration import Calibration, Draft, ModelLoader


def read_first(earlier: Manifest | None, read: Callable[[], Draft]) -> Draft | None:
    """Read text before the folder is taken, so that unreadable text never takes it.

    Args:
        earlier: of the run that began in the folder, if one did.
        read: reads all that no model has to write.

    Returns:
        The text; None if an earlier session has kept it.
    """
    return None if earlier is not None and earlier.text else read()


def calibrate_once(
    run: Run | None,
    first: Draft | None,
    read: Callable[[], Draft],
    model_loader: ModelLoader,
    progress: Progress,
) -> Calibration:
    """Return the text that an earlier session kept, or else complete what was read first or now."""
    saved = None if run is None else run.folder / "calibration.safetensors"
    if run is not None and saved is not None and run.has(saved):
        return Calibration(load_file(saved)["tokens"], run.manifest.text)
    calibration = (read() if first is None else first).complete(model_loader, progress)
    if run is not None and saved is not None:
        write_safetensors(saved, {"tokens": calibration.tokens})
        run.keep([saved], text=calibration.description)
    return calibration
