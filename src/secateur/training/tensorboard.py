"""The log of a run as curves in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from secateur.runs.errors import SecateurError
from secateur.training.log import Entry, Follower

LogTo = Literal["tensorboard"]


def check_installed(log_to: LogTo | None) -> None:
    """Raise SecateurError if the package that writes the curves is not there."""
    if log_to is not None and find_spec("tensorboard") is None:
        raise SecateurError(
            "Curves for TensorBoard need the package tensorboard; install secateur[tensorboard], "
            "or leave --log-to out."
        )


@contextmanager
def follower(log_to: LogTo | None, work: Path) -> Iterator[Follower | None]:
    """Within the context, what is to be called with every entry of the log; None for nothing.

    Scalars have the keys of the entries and go to ``work / "tensorboard"``. A log hands over its
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
