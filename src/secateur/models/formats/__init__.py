"""What a linear looks like in the files; a format joins by its module and its line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

# What a user calls each format, and where its class is, which is imported when it is needed.
FORMATS = {
    "plain": "plain.Plain",
    "dequantized": "plain.Plain",  # what quantize calls it
    "packed": "packed.Packed",
}

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
