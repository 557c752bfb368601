"""Values of a JSON document that may be old, new or damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# What is larger than this is no measurement, and overflows in arithmetic.
_LARGEST = 1e100


@dataclass(frozen=True)
class Facts:
    """A part of a document, asked by path; what is missing or of another kind is None.

    Attributes:
        value: as JSON has it.
    """

    value: object = None

    def at(self, *path: str | int) -> Facts:
        """What lies at the end of the path."""
        value = self.value
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return Facts()
        return Facts(value)

    def number(self, *path: str | int) -> float | None:
        """A finite number."""
        value = self.at(*path).value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        # A NaN is not within any limits.
        return float(value) if -_LARGEST < value < _LARGEST else None

    def text(self, *path: str | int) -> str | None:
        """A text that is not empty."""
        value = self.at(*path).value
        return value if isinstance(value, str) and value else None

    def items(self, *path: str | int) -> list[Facts]:
        """The items of a list."""
        value = self.at(*path).value
        return [Facts(item) for item in value] if isinstance(value, list) else []

    def texts(self, *path: str | int) -> list[str]:
        """The texts of a list."""
        return [text for item in self.items(*path) if (text := item.text())]

    def pairs(self, *path: str | int) -> Iterator[tuple[str, Facts]]:
        """Keys and values of a mapping."""
        value = self.at(*path).value
        if isinstance(value, dict):
            for key, inner in value.items():
                yield str(key), Facts(inner)

    def __bool__(self) -> bool:
        return self.value is not None
