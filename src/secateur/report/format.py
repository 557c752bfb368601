"""Quantities as people read them."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """``1.73 GB``, ``240 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def seconds_text(seconds: float) -> str:
    """``42.1 s``, ``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
