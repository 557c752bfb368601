"""Pack documents into windows of token ids, all of the same length and without padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent
from secateur.text.documents import read_documents
from secateur.text.sources import Source

CHARACTERS_PER_TOKEN = 8
"""No ordinary text has more; what is read of a text is bounded by it."""

# Documents that the tokenizer sees at a time, and the characters that end a batch early.
_DOCUMENTS = 64
_CHARACTERS = 2**24
# Models tuned for chat end a turn, not a text, with their end-of-sequence token.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


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


def end_of_text_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that separated documents when the model was trained.

    ``<|endoftext|>`` or ``<|end_of_text|>`` if the vocabulary has one, or else the end-of-sequence
    token, or else the beginning-of-sequence token; None if there is none of them.
    """
    vocabulary = tokenizer.get_vocab()
    for name in _END_OF_TEXT:
        if name in vocabulary:
            return int(vocabulary[name])
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    return None


def beginning_of_text_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that windows begin with where the user asks for it.

    Raises:
        SecateurError: the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise SecateurError(
            "The tokenizer has no beginning-of-text token to begin windows with; leave bos out."
        )
    return int(tokenizer.bos_token_id)


def read_tokens(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    progress: Progress = silent,
) -> TokenStream:
    """Read and tokenise sources one behind another; arguments are those of ``tokenize``."""
    # One character more than will be tokenised shows that there is more.
    characters = CHARACTERS_PER_TOKEN * limit + 1
    documents = chain.from_iterable(
        read_documents(source, split="train", characters=characters, tokenizer=tokenizer)
        for source in sources
    )
    return tokenize(documents, tokenizer, limit, progress)


def tokenize(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    progress: Progress = silent,
) -> TokenStream:
    """Tokenise documents in their order with one end-of-text token between them.

    Documents without a token are left out. No other special token is added.

    Args:
        documents: texts, read as they are needed.
        tokenizer: the model's.
        limit: stop at this many tokens, in the middle of a document if need be.
        progress: told how many of ``limit`` tokens there are.
    """
    separator = end_of_text_token(tokenizer)
    stream = array("i")
    count = 0
    cut = False
    longest = 0
    for batch in _batches(documents):
        # A single document may be larger than all that is needed.
        texts = [text[: CHARACTERS_PER_TOKEN * limit] for text in batch]
        cut = cut or texts != batch
        longest = max(longest, *map(len, batch))
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            if not ids:
                continue
            if stream and separator is not None:
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


def draw_windows(tokens_N: Tensor, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut ``samples`` windows of ``length`` tokens at random positions, (samples, length).

    Every start that leaves room for a window is equally likely, and windows may overlap.
    """
    starts_S = torch.randint(0, len(tokens_N) - length + 1, (samples,), generator=generator)
    return tokens_N.unfold(0, length, 1)[starts_S]


def consecutive_windows(tokens_N: Tensor, length: int) -> Tensor:
    """Cut tokens into windows one behind another, (windows, length); an incomplete tail goes."""
    count = len(tokens_N) // length
    return tokens_N[: count * length].view(count, length)


def begin_windows(windows_WL: Tensor, first: int | None) -> Tensor:
    """Put a token in front of every window, (windows, length + 1); None changes nothing."""
    if first is None:
        return windows_WL
    return torch.cat([windows_WL.new_full((len(windows_WL), 1), first), windows_WL], dim=1)
