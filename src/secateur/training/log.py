"""The log of a run: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from secateur.runs.files import write_text

Entry = Mapping[str, float]
Follower = Callable[[Entry], None]


class Log:
    """Lines of a file, each with the ``step`` after which it was written.

    Attributes:
        entries: all of them, in order.
    """

    def __init__(self, path: Path, steps: int, follower: Follower | None = None) -> None:
        """Go on with a log, without what is later than ``steps``: it will be done again.

        ``follower`` is called with every entry, those that are there already first.
        """
        self._path = path
        self._follower = follower
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        read = [entry for line in lines if (entry := _whole(line)) is not None]
        self.entries: list[Entry] = [entry for entry in read if entry["step"] <= steps]
        write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in self.entries))
        for entry in self.entries:
            self._show(entry)

    def add(self, entry: Mapping[str, float | None]) -> None:
        """Append a line; what is None is left out."""
        kept = {key: value for key, value in entry.items() if value is not None}
        self.entries.append(kept)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(kept)}\n")
        self._show(kept)

    def _show(self, entry: Entry) -> None:
        if self._follower is not None:
            self._follower(entry)

    def with_key(self, key: str) -> list[Entry]:
        """The entries that have a ``key``."""
        return [entry for entry in self.entries if key in entry]


def _whole(line: str) -> Entry | None:
    """A killed run may have left half a line."""
    try:
        entry: Entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry
