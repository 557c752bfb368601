"""The log of a run: one JSON object per line, and the same figures as curves in TensorBoard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from secateur.runs.errors import SecateurError
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

    def with_key(self, key: str) -> list[Entry]:
        """The entries that have a ``key``."""
        return [entry for entry in self.entries if key in entry]

    def _show(self, entry: Entry) -> None:
        if self._follower is not None:
            self._follower(entry)


def _whole(line: str) -> Entry | None:
    """A killed run may have left half a line."""
    try:
        entry: Entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry


def check_tensorboard(log_to: str | None) -> None:
    """Raise SecateurError if TensorBoard is wanted and not installed."""
    if log_to is not None and find_spec("tensorboard") is None:
        raise SecateurError(
            "Curves for TensorBoard need the package tensorboard; install secateur[tensorboard], "
            "or leave --log-to out."
        )


@contextmanager
def follower(log_to: str | None, work: Path) -> Iterator[Follower | None]:
    """Give what draws every entry of a log in TensorBoard; None if that is not wanted.

    Curves have the keys of the entries and go to ``work / "tensorboard"``. A log hands over its
    earlier entries as well, so the files of earlier sessions are replaced.
    """
    if log_to is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = work / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as writer:

        def write(entry: Entry) -> None:
            for key, value in entry.items():
                if key != "step":
                    writer.add_scalar(key, value, int(entry["step"]))

        yield write
