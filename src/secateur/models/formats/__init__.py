"""What a linear looks like in the files; a format joins by its module and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from secateur.models.formats.format import WeightFormat
from secateur.models.formats.packed import Packed
from secateur.models.formats.plain import Plain

_FORMATS: tuple[type[WeightFormat], ...] = (
    Plain,
    Packed,
)

FORMATS: dict[str, type[WeightFormat]] = {name: each for each in _FORMATS for name in each.names}

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def recognise(described: Mapping[str, Any] | None) -> WeightFormat | None:
    """Return the format that a ``quantization_config`` speaks of, None if it is not known."""
    found = (each.recognise(described or {}) for each in _FORMATS)
    return next((each for each in found if each is not None), None)
