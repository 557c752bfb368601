"""Pack documents into windows of token ids, all of the same length and without padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.runs.progress import Progress, silent

CHARACTERS_PER_TOKEN = 8
"""No ordinary text has more; what is read of a text is bounded by it."""

_DOCUMENTS_AT_A_TIME = 64
# Models tuned for chat end a turn, not a text, with their end-of-sequence token.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class TokenStream:
    """Documents one behind another.

    Attributes:
        tokens_N: (tokens,), int64; int32 where they were kept.
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
    stream = array("q")
    count = 0
    cut = False
    longest = 0
    rest = iter(documents)
    while len(stream) <= limit and (batch := list(islice(rest, _DOCUMENTS_AT_A_TIME))):
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
    progress("Tokenising", limit, limit)
    tokens_N = torch.tensor(stream[:limit], dtype=torch.int64)
    return TokenStream(tokens_N, count, capped=cut or len(stream) > limit, longest=longest)


def draw_windows(tokens_N: Tensor, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut ``samples`` windows of ``length`` tokens at random positions, (samples, length).

    Every start that leaves room for a window is equally likely, and windows may overlap.
    """
    starts_S = torch.randint(0, len(tokens_N) - length + 1, (samples,), generator=generator)
    return tokens_N.unfold(0, length, 1)[starts_S]
