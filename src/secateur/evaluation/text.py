"""The text a model is evaluated on, cut into windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.evaluation.options import EvaluationOptions
from secateur.runs.errors import SecateurError
from secateur.text.documents import join_texts, read_documents
from secateur.text.packing import (
    begin_windows,
    beginning_of_text_token,
    consecutive_windows,
)
from secateur.text.sources import find_dataset, find_file

# A hub data set of documents may be endless; tables rest on far less.
_HUB_CHARACTERS = 10_000_000
# A file is tokenised as a whole; a small archive may hold more than the memory does.
_FILE_CHARACTERS = 2**28


@dataclass(frozen=True)
class EvaluationText:
    """A text and the name of its file, or name, configuration and split of its data set."""

    name: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def words(self) -> int:
        return len(self.content.split())


def read_text(path: str | Path) -> EvaluationText:
    """Read a text file as it is, or the texts of a JSON-lines file joined by blank lines.

    Raises:
        SecateurError: there is no such file, it cannot be read, it is empty, or it is too large.
    """
    file = find_file(str(path))
    if file is None:
        raise SecateurError(f"There is no file {path}; check the path, or name a data set instead.")
    texts = read_documents(file, split="", characters=_FILE_CHARACTERS + 1)
    content = join_texts(texts, _FILE_CHARACTERS)
    if len(content) > _FILE_CHARACTERS:
        raise SecateurError(
            f"The evaluation text {path} has more than {_FILE_CHARACTERS:,} characters; cut it."
        )
    return _not_empty(EvaluationText(file.name, content))


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
        tokens: of the whole text.
        windows_WL: int64 (windows, length).
    """

    text: EvaluationText
    tokens: int
    windows_WL: Tensor

    @classmethod
    def read(cls, options: EvaluationOptions, tokenizer: PreTrainedTokenizerBase) -> Passage:
        """Read a text, tokenise it whole, without special tokens, and cut it.

        Raises:
            SecateurError: it cannot be read or is shorter than a window, or there is no token to
                begin windows with.
        """
        path = options.text
        text = read_dataset(str(options.dataset)) if path is None else read_text(path)
        bos = beginning_of_text_token(tokenizer) if options.bos else None
        encoded = tokenizer(
            text.content, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        tokens_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        windows_WL = split_windows(tokens_N, options.window, options.max_windows, bos)
        return cls(text, len(tokens_N), windows_WL)

    @property
    def tokens_per_word(self) -> float:
        """Tokens of the whole text over its words."""
        return self.tokens / self.text.words


def split_windows(
    tokens_N: Tensor, window: int, max_windows: int | None = None, bos: int | None = None
) -> Tensor:
    """Cut tokens into consecutive windows that do not overlap; the incomplete tail is dropped.

    Args:
        tokens_N: int64 (tokens,).
        window: tokens per window.
        max_windows: take the first so many.
        bos: a token put in front of every window, which counts as one of its tokens.

    Returns:
        int64 (windows, window).

    Raises:
        SecateurError: a window cannot predict anything, or the text is shorter than one window.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise SecateurError(
            f"{max_windows if window > 1 else 'A'} windows of {window} tokens predict nothing; "
            "use at least one window of two tokens."
        )
    body = window if bos is None else window - 1
    count = len(tokens_N) // body
    if count == 0:
        raise SecateurError(
            f"The evaluation text has {len(tokens_N)} tokens and one window needs {body}; use a "
            "longer text or a shorter window."
        )
    count = count if max_windows is None else min(count, max_windows)
    return begin_windows(consecutive_windows(tokens_N, body)[:count], bos)
