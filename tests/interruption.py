"""Runs that are interrupted at a known place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from secateur.runs.run import Run


@contextmanager
def interrupted_after(blocks: int) -> Iterator[None]:
    """Within the context a run is interrupted once so many blocks are recorded; it must be."""
    record = Run.record

    def stop(run: Run, unit: dict[str, object], files: Iterable[Path] = ()) -> None:
        record(run, unit, files)
        if len(run.finished) == blocks:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "record", stop)
        yield
