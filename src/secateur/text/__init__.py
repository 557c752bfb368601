"""Calibration and training text: from what the user names to windows of token ids."""
