"""The text a model is evaluated on, cut into windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secateur.evaluation.options import EvaluationOptions
from secateur.runs.errors import SecateurError
from secateur.text.documents import join_texts, read_documents
from secateur.text.encoder import Encoder
from secateur.text.packing import CHARACTERS_PER_TOKEN, begin_text, consecutive_windows
from secateur.text.sources import find_dataset, find_file

# A hub data set of documents may be endless; tables rest on far less.
_HUB_CHARACTERS = 10_000_000
# A file is tokenised as a whole; a small archive may hold more than the memory does.
_FILE_CHARACTERS = 2**26
# Of a larger file only the beginning is read if no more than some windows of it are wanted.
_SOME_CHARACTERS = 2**21
# Behind so many more tokens, where a text is cut does not change those before.
_MARGIN = 64


@dataclass(frozen=True)
class EvaluationText:
    """A text that is evaluated on.

    Attributes:
        name: of its file, or name, configuration and split of its data set.
        content: what was read.
        whole: there is no more of it than what was read.
    """

    name: str
    content: str
    whole: bool = True

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def words(self) -> int:
        return len(self.content.split())


def read_text(path: str | Path, characters: int | None = None) -> EvaluationText:
    """Read a text file as it is, or the texts of a JSON-lines file joined by blank lines.

    Args:
        path: the file.
        characters: read so many at most; None reads all, and refuses what is too large.

    Raises:
        SecateurError: there is no such file, it cannot be read, it is empty, or it is too large.
    """
    file = find_file(str(path))
    if file is None:
        raise SecateurError(f"There is no file {path}; check the path, or name a data set instead.")
    most = _FILE_CHARACTERS if characters is None else min(characters, _FILE_CHARACTERS)
    content = join_texts(read_documents(file, split="", characters=most + 1), most)
    if len(content) > most and most != characters:
        raise SecateurError(
            f"The evaluation text {path} has more than {_FILE_CHARACTERS:,} characters; evaluate "
            "fewer windows with --max-windows, or cut it."
        )
    return _not_empty(EvaluationText(file.name, content[:most], len(content) <= most))


def read_dataset(name: str) -> EvaluationText:
    """Read a hub data set, its rows joined by blank lines; of 10 million characters on, no more.

    Args:
        name: ``wikitext2`` or ``USER/NAME[:CONFIG][:SPLIT]``; the split is test if not named.

    Raises:
        SecateurError: the name is not formed like a data set's, or it cannot be read.
    """
    dataset = find_dataset(name)
    rows = read_documents(dataset, split="test", characters=_HUB_CHARACTERS)
    return _not_empty(EvaluationText(dataset.label("test"), join_texts(rows, _HUB_CHARACTERS)))


def _not_empty(text: EvaluationText) -> EvaluationText:
    if not text.words:
        raise SecateurError(f"The evaluation text {text.name} is empty; name one with words in it.")
    return text


@dataclass(frozen=True)
class Passage:
    """A text cut into windows.

    Attributes:
        text: what was read.
        tokens: of what was read.
        windows_WL: int64 (windows, length).
    """

    text: EvaluationText
    tokens: int
    windows_WL: Tensor

    @classmethod
    def read(cls, options: EvaluationOptions, encoder: Encoder) -> Passage:
        """Read a text, tokenise it in one piece, and cut it.

        Of a file of more than two million characters no more is read than the windows need, if
        their number is given.

        Raises:
            SecateurError: it cannot be read or is shorter than a window, the tokenizer fails, or
                the model has no row for a token.
        """
        check_windows(options.window, options.max_windows)
        if options.text is None:
            text = read_dataset(str(options.dataset))
            tokens_N = _tokens(text, encoder)
        else:
            text, tokens_N = _beginning(options.text, options, encoder)
        windows_WL = split_windows(
            begin_text(tokens_N, encoder.of_text),
            options.window,
            options.max_windows,
            encoder.of_window,
        )
        return cls(text, len(tokens_N), windows_WL)

    @property
    def tokens_per_word(self) -> float:
        """Tokens of the text over its words."""
        return self.tokens / self.text.words


def _beginning(
    path: str | Path, options: EvaluationOptions, encoder: Encoder
) -> tuple[EvaluationText, Tensor]:
    """As much of a file as the windows need, and its tokens."""
    if options.max_windows is None:
        text = read_text(path)
        return text, _tokens(text, encoder)
    wanted = options.max_windows * options.window + _MARGIN
    characters = CHARACTERS_PER_TOKEN * wanted
    text = read_text(path, _SOME_CHARACTERS)
    while True:
        if not text.whole:
            text = read_text(path, characters)
        tokens_N = _tokens(text, encoder)
        if text.whole or len(tokens_N) >= wanted:
            return text, tokens_N
        characters *= 4


def _tokens(text: EvaluationText, encoder: Encoder) -> Tensor:
    (ids,) = encoder.encode([text.content])
    return torch.tensor(ids, dtype=torch.int64)


def check_windows(window: int, max_windows: int | None) -> None:
    """Raise SecateurError if such windows predict nothing."""
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise SecateurError(
            f"{max_windows if window > 1 else 'A'} windows of {window} tokens predict nothing; "
            "use at least one window of two tokens."
        )


def split_windows(
    tokens_N: Tensor, window: int, max_windows: int | None = None, bos: int | None = None
) -> Tensor:
    """Cut tokens into consecutive windows that do not overlap; the incomplete tail is dropped.

    Args:
        tokens_N: int64 (tokens,).
        window: tokens per window.
        max_windows: take the first so many.
        bos: a token that every window begins with, which counts as one of its tokens.

    Returns:
        int64 (windows, window).

    Raises:
        SecateurError: a window cannot predict anything, or the text is shorter than one window.
    """
    check_windows(window, max_windows)
    windows_WL = consecutive_windows(tokens_N, window, bos)
    if len(windows_WL) == 0:
        raise SecateurError(
            f"The evaluation text has {len(tokens_N)} tokens and one window needs "
            f"{window - (bos is not None)}; use a longer text or a shorter window."
        )
    return windows_WL[:max_windows]
