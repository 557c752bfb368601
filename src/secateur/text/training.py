"""Training text: windows of tokens in a fixed order, and some that are held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.runs.files import write_safetensors
from secateur.runs.progress import Progress, silent
from secateur.text.options import divide
from secateur.text.packing import CHARACTERS_PER_TOKEN, TokenStream, tokenize
from secateur.text.sources import (
    TEXT_SUFFIXES,
    HubDataset,
    read_documents,
    resolve_source,
)
from secateur.text.tokens import TokenCache


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and to validate with.

    Attributes:
        train_WL: int32 (windows, length), in the order of training; may be a mapped file.
        held_out_WL: int32, none of the above.
        parts: what the report says of each source.
    """

    train_WL: Tensor
    held_out_WL: Tensor
    parts: tuple[dict[str, Any], ...] = ()

    def write(self, path: Path) -> None:
        """Keep the windows in a file."""
        write_safetensors(path, {"train": self.train_WL, "held_out": self.held_out_WL})

    @classmethod
    def read(cls, path: Path) -> TrainingText:
        """Windows that were kept, mapped rather than read."""
        tensors = load_file(path)
        return cls(tensors["train"], tensors["held_out"])


@dataclass(frozen=True)
class Part:
    """Texts that are drawn from together.

    Attributes:
        name: as the user named it.
        weight: its share of the windows, relative to that of the others; None if nothing has
            one, and all windows are equally likely.
        sources: the files of a folder, or one file or hub data set.
    """

    name: str
    weight: float | None
    sources: tuple[Path | HubDataset, ...]


def find_texts(names: Sequence[str]) -> list[Part]:
    """Resolve files, folders (their text files, by name) and hub data sets, in order.

    A name may end in ``:WEIGHT``, a number; then all have to.

    Raises:
        SecateurError: nothing of that name, a folder without text files, no name at all, or a
            weight that is not positive or missing.
    """
    if not names:
        raise SecateurError("Training needs text; name files, folders or hub data sets.")
    parts = [_find_part(name) for name in names]
    if len({part.weight is None for part in parts}) > 1:
        bare = next(part.name for part in parts if part.weight is None)
        raise SecateurError(f"{bare} has no weight and others have; write {bare}:WEIGHT.")
    return parts


def _find_part(name: str) -> Part:
    bare, weight = _split_weight(name)
    folder = Path(bare).expanduser()
    if not folder.is_dir():
        return Part(bare, weight, (resolve_source(bare),))
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(TEXT_SUFFIXES))
    if not files:
        raise SecateurError(
            f"The folder {bare} holds no text files; put {', '.join(TEXT_SUFFIXES)} into it."
        )
    return Part(bare, weight, tuple(files))


def _split_weight(name: str) -> tuple[str, float | None]:
    bare, colon, number = name.rpartition(":")
    if not colon or Path(name).expanduser().exists():
        return name, None
    try:
        weight = float(number)
    except ValueError:
        # A configuration or split of a hub data set.
        return name, None
    if not (weight > 0 and math.isfinite(weight)):
        raise SecateurError(f"The weight of {bare} is {number}; give a positive number.")
    return bare, weight


def load_text(
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    held_out: int,
    length: int,
    seed: int,
    validation: Path | HubDataset | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> TrainingText:
    """Tokenise texts, cut them into windows, and shuffle those of all together.

    No source is read further than the whole run could need. Held-out windows are drawn first, so
    they are the same for every budget of the same text that is read whole. Conversations are
    rendered by the tokenizer's chat template.

    Args:
        parts: from ``find_texts``.
        tokenizer: the model's.
        windows: to train on.
        held_out: to validate with.
        length: tokens per window.
        seed: decides the order.
        validation: a text of its own to validate with; at most its first ``held_out`` windows.
        cache: where tokens of files are kept for other runs; nowhere if None.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: there is less text than asked for; the message has both numbers.
    """
    kept = None if cache is None else TokenCache(cache, tokenizer)
    pool = _Pool(tokenizer, length, kept, progress)
    generator = torch.Generator().manual_seed(seed)
    held_out_WL = None
    if validation is not None:
        held_out_WL, held_out = pool.windows([validation], held_out, purpose="validation"), 0
        if len(held_out_WL) == 0:
            raise SecateurError(
                f"The validation text has less than one window of {length} tokens; name a longer "
                "one."
            )
    if parts[0].weight is None:
        parts = [Part("the text", 1.0, tuple(source for part in parts for source in part.sources))]
    weights = {str(index): part.weight or 1.0 for index, part in enumerate(parts)}
    drawn: list[Tensor] = []
    left_out: list[Tensor] = []
    shares = zip(divide(windows, weights).values(), divide(held_out, weights).values(), strict=True)
    for part, (train, aside) in zip(parts, shares, strict=True):
        found_WL = pool.windows(part.sources, train + aside)
        there = len(found_WL)
        if there < train + aside:
            raise SecateurError(
                f"Training needs {train * length:,} tokens and {aside * length:,} held-out ones, "
                f"and {part.name} has {there * length:,} in whole windows; name more text or ask "
                "for fewer tokens."
            )
        order = torch.randperm(there, generator=generator)
        left_out.append(found_WL[order[:aside]])
        drawn.append(found_WL[order[aside : aside + train]])
    train_WL = torch.cat(drawn)
    if len(parts) > 1:
        train_WL = train_WL[torch.randperm(len(train_WL), generator=generator)]
    if held_out_WL is None:
        held_out_WL = torch.cat(left_out)
    return TrainingText(train_WL, held_out_WL, tuple(pool.facts))


class _Pool:
    """Windows of sources, and what the report says of each."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        cache: TokenCache | None,
        progress: Progress,
    ) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._cache = cache
        self._progress = progress
        self.facts: list[dict[str, Any]] = []

    def windows(
        self, sources: Sequence[Path | HubDataset], most: int, purpose: str = "training"
    ) -> Tensor:
        """All windows of sources in their order, of none more than so many; int32."""
        limit = most * self._length
        found: list[Tensor] = []
        for source in sources:
            stream, cache = self._stream(source, limit)
            whole = len(stream.tokens_N) // self._length
            tokens_N = stream.tokens_N[: whole * self._length]
            found.append(tokens_N.int().view(whole, self._length))
            name = source.label("train") if isinstance(source, HubDataset) else source.name
            facts = {"source": name, "documents": stream.documents, "windows": whole}
            self.facts.append({**facts, "purpose": purpose, "cache": cache})
        return torch.cat(found)

    def _stream(self, source: Path | HubDataset, limit: int) -> tuple[TokenStream, str]:
        """Tokens of a source, and what the cache had to do with them."""
        key = None
        if self._cache is not None and isinstance(source, Path):
            key = self._cache.key(source)
        if self._cache is None or key is None:
            return self._tokenize(source, limit), "unused"
        if (found := self._cache.find(key, limit)) is not None:
            self._progress("Tokens from the cache", limit, limit)
            return found, "taken"
        stream = self._tokenize(source, limit)
        return stream, "kept" if self._cache.keep(key, limit, stream) else "unused"

    def _tokenize(self, source: Path | HubDataset, limit: int) -> TokenStream:
        documents = read_documents(
            source,
            split="train",
            characters=CHARACTERS_PER_TOKEN * limit + 1,
            render=self._render,
        )
        return tokenize(documents, self._tokenizer, limit, self._progress)

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._tokenizer.chat_template is None:
            raise SecateurError(
                "The data holds conversations and the tokenizer has no chat template; give their "
                "texts under 'text'."
            )
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(rendered, str), "one conversation has one text"
        return rendered
