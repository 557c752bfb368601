"""The memory of a run, from a trial on a small model of the same proportions."""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from secateur.models.checkpoint import Checkpoint
from secateur.models.miniature import divisors, write_miniature
from secateur.runs.allocations import peak_allocation
from secateur.runs.errors import SecateurError
from secateur.runs.limits import sizes_divided_by

# What the process grows by beside tensors: libraries that are imported late, text.
_OTHERS_BYTES = 80_000_000
# Memory that was freed in small pieces stays with the process, up to so much.
_KEPT_SHARE = 0.6
_MOST_KEPT_BYTES = 150_000_000
# What libraries use inside of their operations.
_SLACK = 1.06
# Letters of the text for each token that is read: a miniature's tokens are bytes.
_LETTERS = 1.25


@dataclass(frozen=True)
class Trial:
    """Where a trial takes place.

    Attributes:
        model: the miniature.
        text: a text file.
        output: a folder that is not there yet.
        divisor: of the miniature's sizes.
    """

    model: Path
    text: Path
    output: Path
    divisor: int

    def length(self, tokens: int) -> int:
        """A length of text, divided; two tokens at least."""
        return max(2, -(-tokens // self.divisor))


def peak_of(
    source: Checkpoint,
    run: Callable[[Trial], object],
    *,
    tokens: int,
    depth: int,
    pruned: bool = False,
) -> int:
    """Return the peak of resident memory of a run on a real model, bytes.

    Args:
        source: the real model.
        run: does the same on a miniature.
        tokens: of text that the real run reads.
        depth: most blocks of the miniature.
        pruned: whether half of its weights are zero.

    Raises:
        SecateurError: the run is refused.
    """
    before = resident()
    refusal: SecateurError | None = None
    for divisor in divisors(source):
        with tempfile.TemporaryDirectory(prefix="secateur-") as name:
            folder = Path(name)
            miniature = write_miniature(source, folder / "model", divisor, depth, pruned=pruned)
            text = folder / "text.txt"
            _write_text(text, round(_LETTERS * tokens / divisor) + 1024)
            trial = Trial(miniature.folder, text, folder / "output", divisor)
            try:
                with sizes_divided_by(divisor):
                    peak = peak_allocation(partial(run, trial))
            except SecateurError as error:
                # A width that no pattern or group divides any more: a larger one may do.
                refusal = error
                continue
        held = peak * divisor**2
        kept = min(_KEPT_SHARE * held, _MOST_KEPT_BYTES)
        return before + round(_SLACK * held + kept)
    raise SecateurError(
        f"What this run needs cannot be told from a smaller model ({refusal}); leave the option "
        "out that it speaks of, to see what the others need."
    )


def resident() -> int:
    """Memory of this process without the tensors of a run, bytes."""
    return psutil.Process().memory_info().rss + _OTHERS_BYTES


def _write_text(path: Path, size: int) -> None:
    letters = random.Random(0).choices(string.ascii_letters + " ", k=size)
    path.write_text("".join(letters), encoding="utf-8")
