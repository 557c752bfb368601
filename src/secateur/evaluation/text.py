"""The text a model is evaluated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from secateur.runs.errors import SecateurError
from secateur.text.sources import find_dataset, find_file, read_documents

# A hub data set of documents may be endless; tables rest on far less.
_HUB_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class EvaluationText:
    """A text and what it is called.

    Attributes:
        name: file name, or name, configuration and split of a data set.
        content: the text itself.
    """

    name: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def words(self) -> int:
        """Words separated by white space."""
        return len(self.content.split())


def read_text(path: str | Path) -> EvaluationText:
    """Read a text file as it is, or the texts of a JSON-lines file joined by blank lines.

    Raises:
        SecateurError: there is no such file, it cannot be read, or it is empty.
    """
    file = find_file(str(path))
    if file is None:
        raise SecateurError(f"There is no file {path}; check the path, or name a data set instead.")
    return _not_empty(EvaluationText(file.name, "\n\n".join(read_documents(file, split=""))))


def read_dataset(name: str) -> EvaluationText:
    """Read a hub data set, its rows joined by blank lines; of 10 million characters on, no more.

    Args:
        name: ``wikitext2`` or ``USER/NAME[:CONFIG][:SPLIT]``; the split is test if not named.

    Raises:
        SecateurError: the name is not formed like a data set's, or it cannot be read.
    """
    dataset = find_dataset(name)
    rows: list[str] = []
    size = 0
    for row in read_documents(dataset, split="test", characters=_HUB_CHARACTERS):
        rows.append(row)
        size += len(row)
        if size > _HUB_CHARACTERS:
            break
    return _not_empty(EvaluationText(dataset.label("test"), "\n\n".join(rows)))


def _not_empty(text: EvaluationText) -> EvaluationText:
    if not text.words:
        raise SecateurError(f"The evaluation text {text.name} is empty; name one with words in it.")
    return text
