"""Does calibration text overlap the text a model is judged by?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SPAN = 13
# Set phrases and titles occur in any two large texts.
_TOLERATED = 0.001
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Leakage:
    """Spans of consecutive words that calibration and evaluation text share.

    Attributes:
        words: in a span.
        spans: of the calibration text.
        shared: those of them that the evaluation text has too.
    """

    words: int
    spans: int
    shared: int

    @property
    def share(self) -> float:
        """Shared spans over spans."""
        return self.shared / self.spans if self.spans else 0.0

    @property
    def warning(self) -> str | None:
        """One sentence for the user if more is shared than any two texts would share."""
        if self.share <= _TOLERATED:
            return None
        return (
            f"{self.share:.1%} of the {self.words}-word spans of the calibration text occur in "
            "the evaluation text, so the pruned model looks better than it is; evaluate on other "
            "text."
        )


def find_leakage(calibration: Iterable[str], evaluation: str, words: int = _SPAN) -> Leakage:
    """Count the spans of the calibration texts that the evaluation text has too.

    Case, punctuation and white space do not matter, and no span crosses the end of a text. Spans
    are compared by 64-bit hashes, in time linear in the texts.
    """
    vocabulary: dict[str, int] = {}
    searched = _span_hashes(evaluation, words, vocabulary)
    spans = np.concatenate(
        [np.empty(0, np.uint64), *(_span_hashes(text, words, vocabulary) for text in calibration)]
    )
    return Leakage(words, spans.size, int(np.isin(spans, searched).sum()))


def _span_hashes(text: str, words: int, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """Polynomial hashes, modulo 2⁶⁴, of all spans of the text."""
    found = re.findall(r"\w+", text.lower())
    ids_N = np.array(
        [vocabulary.setdefault(w, len(vocabulary) + 1) for w in found], dtype=np.uint64
    )
    hashes_N = np.zeros(max(0, ids_N.size - words + 1), dtype=np.uint64)
    for offset in range(words):
        hashes_N = hashes_N * _MULTIPLIER + ids_N[offset : offset + hashes_N.size]
    return hashes_N
