"""Quantities as people read them."""

from __future__ import annotations

import re


def bytes_text(count: float) -> str:
    """``1.73 GB``, ``240 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def seconds_text(seconds: float) -> str:
    """``42.1 s``, ``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def number_text(value: float | None, form: str = "{:,.6g}") -> str:
    """A number in some form; nothing if it is not known."""
    return "" if value is None else form.format(value)


def count_text(count: float) -> str:
    """``134.5 M``, ``12,345``."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,.0f}"


def width_text(units: float, queries: float | None, dense_queries: float | None) -> str:
    """``1,536`` channels or heads; ``3 × 2`` groups with as many query heads where some share."""
    grouped = bool(units and queries and dense_queries and dense_queries > 1)
    return f"{units:,.0f} × {queries:.0f}" if grouped else f"{units:,.0f}"


def percent_text(share: float | None, digits: int | None = None) -> str:
    """``50 %``, or ``49.97 %`` with two digits; the space is a narrow one that does not break."""
    if share is None:
        return ""
    number = f"{100 * share:.6g}" if digits is None else f"{100 * share:.{digits}f}"
    return f"{number}\u202f%"


def linear_kind(name: str) -> str:
    """A linear's name without numbers: the same linear of all experts is one kind."""
    return re.sub(r"\d+", "*", name)


def fit_text(fit: float, linears: float) -> str:
    """How many linears a format holds."""
    whole = "all" if fit == linears else "none" if not fit else f"{fit:,.0f}"
    return f"fits {whole} of {linears:,.0f} linears"
