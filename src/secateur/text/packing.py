"""Pack documents into windows of token ids, all of the same length and without padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from secateur.runs.progress import Progress, silent
from secateur.text.documents import read_documents
from secateur.text.encoder import Encoder
from secateur.text.sources import Source

CHARACTERS_PER_TOKEN = 8
"""No ordinary text has more; what is read of a text is bounded by it."""

# Documents that the tokenizer sees at a time, and the characters that end a batch early.
_DOCUMENTS = 64
_CHARACTERS = 2**24


@dataclass(frozen=True)
class TokenStream:
    """Documents one behind another.

    Attributes:
        tokens_N: int32 (tokens,).
        documents: how many there are.
        capped: the source held more than was asked for.
        longest: characters of the longest document that was read.
    """

    tokens_N: Tensor
    documents: int
    capped: bool
    longest: int


def read_tokens(
    sources: Sequence[Source],
    encoder: Encoder,
    limit: int,
    progress: Progress = silent,
) -> TokenStream:
    """Read and tokenise sources one behind another; arguments are those of ``tokenize``."""
    # One character more than will be tokenised shows that there is more.
    characters = CHARACTERS_PER_TOKEN * limit + 1
    documents = chain.from_iterable(
        read_documents(source, split="train", characters=characters, tokenizer=encoder.tokenizer)
        for source in sources
    )
    return tokenize(documents, encoder, limit, progress)


def tokenize(
    documents: Iterable[str],
    encoder: Encoder,
    limit: int,
    progress: Progress = silent,
) -> TokenStream:
    """Tokenise documents in their order with one end-of-text token between them.

    Documents without a token are left out. No other special token is added.

    Args:
        documents: texts, read as they are needed.
        encoder: of the model.
        limit: stop at this many tokens, in the middle of a document if need be.
        progress: told how many of ``limit`` tokens there are.

    Raises:
        SecateurError: the tokenizer fails, or gives a token that the model has no row for.
    """
    separator = encoder.separator
    stream = array("i")
    count = 0
    cut = False
    longest = 0
    for batch in _batches(documents):
        # A single document may be larger than all that is needed.
        texts = [text[: CHARACTERS_PER_TOKEN * limit] for text in batch]
        cut = cut or texts != batch
        longest = max(longest, *map(len, batch))
        for ids in encoder.encode(texts):
            if not ids:
                continue
            if stream and separator is not None:
                encoder.check([separator])
                stream.append(separator)
            stream.extend(ids)
            count += 1
        progress("Tokenising", min(len(stream), limit), limit)
        if len(stream) > limit:
            break
    progress("Tokenising", limit, limit)
    tokens_N = torch.from_numpy(np.array(stream[:limit], dtype=np.int32))
    return TokenStream(tokens_N, count, capped=cut or len(stream) > limit, longest=longest)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == _DOCUMENTS or size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def draw_windows(
    tokens_N: Tensor,
    samples: int,
    length: int,
    generator: torch.Generator,
    first: int | None = None,
) -> Tensor:
    """Cut ``samples`` windows of ``length`` tokens at random positions, (samples, length).

    Every start that leaves room for a window is equally likely, and windows may overlap. Each
    begins with the token ``first``, if there is one.
    """
    room = tokens_of_window(tokens_N, length, first)
    starts_S = torch.randint(0, len(tokens_N) - room + 1, (samples,), generator=generator)
    return _windows_at(tokens_N, starts_S, length, first)


def consecutive_windows(tokens_N: Tensor, length: int, first: int | None = None) -> Tensor:
    """Cut tokens into windows one behind another, (windows, length); an incomplete tail goes.

    Each begins with the token ``first``, if there is one. It takes the place of a token of text,
    except where the text has it at that place already.
    """
    body = length - (first is not None)
    if first is None or not bool((tokens_N == first).any()):
        count = len(tokens_N) // body
        windows_WL = tokens_N[: count * body].view(count, body)
        if first is None:
            return windows_WL
        return torch.cat([windows_WL.new_full((count, 1), first), windows_WL], dim=1)
    begins_N = (tokens_N == first).tolist()
    starts, at = [], 0
    while at < len(begins_N) and at + body + begins_N[at] <= len(begins_N):
        starts.append(at)
        at += body + begins_N[at]
    return _windows_at(tokens_N, torch.tensor(starts, dtype=torch.int64), length, first)


def tokens_of_window(tokens_N: Tensor, length: int, first: int | None = None) -> int:
    """Tokens that a text must have left for a window to start anywhere in it."""
    return length - (first is not None and not bool((tokens_N == first).any()))


def _windows_at(tokens_N: Tensor, starts_W: Tensor, length: int, first: int | None) -> Tensor:
    places_WL = starts_W[:, None] + torch.arange(length)
    if first is None:
        return tokens_N[places_WL]
    # Where the text has the token there already, it stands for the one that would be put.
    places_WL -= (tokens_N[starts_W] != first).long()[:, None]
    windows_WL = tokens_N[places_WL.clamp_min(0)]
    windows_WL[:, 0] = first
    return windows_WL


def begin_text(tokens_N: Tensor, first: int | None) -> Tensor:
    """Put a token at the head of a text that does not have it there; None changes nothing."""
    if first is None or tokens_N[:1].tolist() == [first]:
        return tokens_N
    return torch.cat([tokens_N.new_tensor([first]), tokens_N])
