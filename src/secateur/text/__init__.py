"""Calibration text: from what the user names to an int64 tensor of token ids."""

from secateur.text.calibration import Calibration, load_calibration, source_files
from secateur.text.leakage import Leakage, find_leakage
from secateur.text.options import CalibrationOptions
from secateur.text.sources import SOURCES

__all__ = [
    "SOURCES",
    "Calibration",
    "CalibrationOptions",
    "Leakage",
    "find_leakage",
    "load_calibration",
    "source_files",
]
