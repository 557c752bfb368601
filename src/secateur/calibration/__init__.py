"""Calibration text: from what the user names to an int64 tensor of token ids."""

from secateur.calibration.leakage import Leakage, find_leakage
from secateur.calibration.load import Calibration, load_calibration, source_files
from secateur.calibration.options import CalibrationOptions
from secateur.calibration.sources import SOURCES

__all__ = [
    "SOURCES",
    "Calibration",
    "CalibrationOptions",
    "Leakage",
    "find_leakage",
    "load_calibration",
    "source_files",
]
