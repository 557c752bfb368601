"""Tokens of text files, kept for the next run that reads the same text in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
from secateur.runs.files import fingerprint_files, sha256_of, write_safetensors
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
    files, and the versions of the libraries. A text that was read to its end serves every run that
    would read it so; the beginning of a longer one, runs that want exactly as much. Tokenizers
    with code of their own are not cached: nothing says what else they depend on.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._tokenizer = _digest_tokenizer(tokenizer)

    def tokens(
        self, source: Path, limit: int, read: Callable[[], TokenStream]
    ) -> tuple[TokenStream, str]:
        """Find the tokens of a text file, or read and keep them.

        Args:
            source: the text file.
            limit: tokens that are wanted.
            read: tokenises the text with this limit.

        Returns:
            The tokens, maybe mapped, and what the cache had to do with them: ``taken``, ``kept``,
            or ``unused``.
        """
        key = self._key(source)
        if key is None:
            return read(), "unused"
        whole = self._folder / f"{key}.safetensors"
        beginning = self._folder / f"{key}-{limit}.safetensors"
        found = _read(whole, capped=False)
        if found is None or not _ends_within(found, limit):
            found = _read(beginning, capped=True)
        if found is not None:
            return found, "taken"
        stream = read()
        is_kept = self._keep(beginning if stream.capped else whole, stream)
        return stream, "kept" if is_kept else "unused"

    def _key(self, source: Path) -> str | None:
        if self._tokenizer is None:
            return None
        try:
            text = _digest_text(source)
        except OSError:
            # Whoever reads the text will say why it cannot be read.
            return None
        parts = [text, source.suffixes[-2:], self._tokenizer]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _keep(self, path: Path, stream: TokenStream) -> bool:
        """Say whether tokens could be kept; a cache that cannot be written costs time alone."""
        numbers = {"documents": stream.documents, "longest": stream.longest}
        tensors = {name: torch.tensor(number) for name, number in numbers.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of processes that keep something at the same time one writes after the other.
            with FileLock(self._folder / "lock", timeout=_PATIENCE):
                write_safetensors(path, {"tokens": stream.tokens_N, **tensors})
        except (OSError, SafetensorError, SecateurError):
            return False
        return True


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
    return sha256_of(source)


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
