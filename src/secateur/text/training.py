"""Training text: windows of tokens in a fixed order, and some that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.runs.files import write_safetensors
from secateur.runs.progress import Progress, silent
from secateur.text.encoder import Encoder
from secateur.text.options import divide
from secateur.text.packing import begin_text, consecutive_windows, read_tokens
from secateur.text.sources import HubDataset, Part, Source
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


def load_text(
    parts: Sequence[Part],
    encoder: Encoder,
    *,
    windows: int,
    held_out: int,
    length: int,
    seed: int,
    validation: Source | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> TrainingText:
    """Tokenise texts, cut them into windows, and shuffle those of all together.

    No source is read further than the whole run could need. Held-out windows are drawn first, so
    they are the same for every budget of the same text that is read whole.

    Args:
        parts: from ``find_texts``.
        encoder: of the model.
        windows: to train on.
        held_out: to validate with.
        length: tokens per window.
        seed: decides the order.
        validation: a text of its own to validate with; at most its first ``held_out`` windows.
        cache: where tokens of files are kept for other runs; nowhere if None.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: there is less text than asked for, the message has both numbers; or a text
            cannot be read, or the model has no row for a token.
    """
    kept = None if cache is None else TokenCache(cache, encoder.tokenizer)
    pool = _Pool(encoder, length, kept, progress)
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
    weights = [part.weight or 1.0 for part in parts]
    drawn: list[Tensor] = []
    left_out: list[Tensor] = []
    shares = zip(divide(windows, weights), divide(held_out, weights), strict=True)
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


@dataclass
class _Pool:
    """Windows of sources, and what the report says of each."""

    encoder: Encoder
    length: int
    cache: TokenCache | None
    progress: Progress
    facts: list[dict[str, Any]] = field(default_factory=list)

    def windows(self, sources: Sequence[Source], most: int, purpose: str = "training") -> Tensor:
        """All windows of sources in their order, at most ``most`` of each; int32."""
        first = self.encoder.of_window
        limit = most * (self.length - (first is not None))
        found: list[Tensor] = []
        for source in sources:
            read = partial(read_tokens, [source], self.encoder, limit, self.progress)
            if self.cache is None or isinstance(source, HubDataset):
                stream, use = read(), "unused"
            else:
                stream, use = self.cache.tokens(source, limit, read)
            if use == "taken":
                self.progress("Tokens from the cache", limit, limit)
            if len(stream.tokens_N):
                self.encoder.check([int(stream.tokens_N.max())])
            tokens_N = begin_text(stream.tokens_N, self.encoder.of_text)
            windows_WL = consecutive_windows(tokens_N, self.length, first)[:most]
            found.append(windows_WL)
            name = source.label("train") if isinstance(source, HubDataset) else source.name
            facts = {"source": name, "documents": stream.documents, "windows": len(windows_WL)}
            self.facts.append({**facts, "purpose": purpose, "cache": use})
        return torch.cat(found)
