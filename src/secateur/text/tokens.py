"""Tokens of text files, kept for the next run that reads the same text in the same way."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files, write_safetensors
from secateur.text.packing import CHARACTERS_PER_TOKEN, TokenStream

# Raised when the tokens of one and the same text become others.
_FORM = 1
_DECIDING = ("secateur", "tokenizers", "transformers")
# Bytes that are read to recognise a text; a larger one takes longer than what is wanted of it.
_DIGESTED = 2**30
# Seconds; writing a file takes few.
_PATIENCE = 60


class TokenCache:
    """A folder of tokenised files that the runs of a user share.

    A file is named after all that its tokens depend on: the bytes of the text (of a huge one
    samples, size and time of change), the suffixes that say how to read them, the tokenizer's own
    files, and the versions of the libraries. A text that was read to its end is kept as a whole,
    which serves every run that would read it so; of a longer one the beginning is kept, for runs
    that want exactly as much.

    Tokenizers with code of their own are not cached: nothing says what else they depend on.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._tokenizer = _digest_tokenizer(tokenizer)

    def key(self, source: Path) -> str | None:
        """Name of a text's tokens, None if they cannot be kept."""
        if self._tokenizer is None:
            return None
        try:
            text = _digest_text(source)
        except OSError:
            # Whoever reads the text will say why it cannot be read.
            return None
        parts = [text, source.suffixes[-2:], self._tokenizer]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def find(self, key: str, limit: int) -> TokenStream | None:
        """Return what ``tokenize`` would with this limit, in int32 and mapped; None if unknown."""
        whole = _read(self._path(key, None), capped=False)
        if whole is not None and _ends_within(whole, limit):
            return whole
        return _read(self._path(key, limit), capped=True)

    def keep(self, key: str, limit: int, stream: TokenStream) -> bool:
        """Keep what ``tokenize`` returned with this limit; say whether that was possible.

        A cache that cannot be written costs time and nothing else. Of processes that keep
        something at the same time one writes after the other.
        """
        path = self._path(key, limit if stream.capped else None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "lock", timeout=_PATIENCE):
                write_safetensors(
                    path,
                    {
                        "tokens": stream.tokens_N.int(),
                        "documents": torch.tensor(stream.documents),
                        "longest": torch.tensor(stream.longest),
                    },
                )
        except (OSError, SafetensorError, SecateurError):
            return False
        return True

    def _path(self, key: str, limit: int | None) -> Path:
        return self._folder / f"{key}{'' if limit is None else f'-{limit}'}.safetensors"


def _read(path: Path, *, capped: bool) -> TokenStream | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return TokenStream(
        tensors["tokens"], int(tensors["documents"]), capped, int(tensors["longest"])
    )


def _digest_text(source: Path) -> str:
    state = source.stat()
    if state.st_size > _DIGESTED:
        return f"{fingerprint_files([source])} {state.st_mtime_ns}"
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ends_within(whole: TokenStream, limit: int) -> bool:
    """Whether ``tokenize`` would come to the end of the text with this limit."""
    return len(whole.tokens_N) <= limit and whole.longest <= CHARACTERS_PER_TOKEN * limit


def _digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash the files that the tokenizer is saved as; None if its code is its own."""
    if not tokenizer.is_fast or type(tokenizer).__module__.partition(".")[0] != "transformers":
        return None
    # Some chat templates write the date.
    day = date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None
    others = [_FORM, [version(name) for name in _DECIDING], day]
    digest = hashlib.sha256(json.dumps(others).encode())
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.name} {len(content)} ".encode())
                digest.update(content)
    return digest.hexdigest()
