from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.text.encoder import Encoder
from secateur.text.packing import draw_windows, tokenize

WORDS = "the cat sat on a mat".split()


def make_words(extra: tuple[str, ...] = (), **special: str) -> PreTrainedTokenizerFast:
    names = [*WORDS, *special.values(), *extra]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(**special: str) -> Encoder:
    return Encoder.of(make_words(**special))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (make_words(("<|endoftext|>",), eos_token="<|im_end|>"), "<|endoftext|>"),
        (make_words(("<|end_of_text|>",), eos_token="<|eot_id|>"), "<|end_of_text|>"),
        (make_words(bos_token="<s>", eos_token="</s>"), "</s>"),
        (make_words(bos_token="<s>"), "<s>"),
        (make_words(), None),
    ],
)
def test_the_token_that_ends_a_text(
    tokenizer: PreTrainedTokenizerBase, expected: str | None
) -> None:
    encoder = Encoder.of(tokenizer, "none")
    assert encoder.name(encoder.separator) == expected


def test_one_end_of_text_token_between_documents() -> None:
    encoder = words(eos_token="</s>", bos_token="<s>")
    stream = tokenize(["the cat", "", "sat", "on a mat"], encoder, limit=100)
    assert stream.tokens_N.tolist() == [0, 1, 6, 2, 6, 3, 4, 5]
    assert stream.tokens_N.dtype == torch.int32
    assert (stream.documents, stream.capped) == (3, False)


def test_without_special_tokens_documents_follow_each_other() -> None:
    stream = tokenize(["the cat", "sat"], words(), limit=100)
    assert stream.tokens_N.tolist() == [0, 1, 2]


@given(
    documents=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), max_size=200),
)
def test_batches_do_not_show(documents: list[str]) -> None:
    encoder = words(eos_token="</s>")
    expected: list[int] = []
    for document in filter(None, documents):
        expected += ([6] if expected else []) + [WORDS.index(word) for word in document.split()]
    assert tokenize(documents, encoder, limit=10**6).tokens_N.tolist() == expected


def test_the_limit_stops_reading() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "the cat sat"

    stream = tokenize(endless(), words(eos_token="</s>"), limit=10)
    assert stream.tokens_N.tolist() == [0, 1, 2, 6, 0, 1, 2, 6, 0, 1]
    assert stream.capped


def test_a_document_is_tokenised_no_further_than_the_limit_needs() -> None:
    stream = tokenize(["a " * 10**6], words(), limit=10)
    assert (stream.tokens_N.tolist(), stream.capped) == ([4] * 10, True)
    # Eight characters a token and no more, even if that is fewer tokens than the limit.
    sparse = tokenize(["a" + " " * 1000 + "cat"], words(), limit=10)
    assert (sparse.tokens_N.tolist(), sparse.capped) == ([4], True)


def test_windows_by_hand() -> None:
    tokens_N = torch.arange(100, 150)
    windows = draw_windows(tokens_N, 7, 8, torch.Generator().manual_seed(3))
    starts = torch.randint(0, 43, (7,), generator=torch.Generator().manual_seed(3)).tolist()
    assert windows.tolist() == [list(range(100 + start, 108 + start)) for start in starts]


def test_every_start_can_be_drawn() -> None:
    windows = draw_windows(torch.arange(10), 500, 8, torch.Generator().manual_seed(0))
    assert windows[:, 0].unique().tolist() == [0, 1, 2]


def test_a_text_of_one_window() -> None:
    windows = draw_windows(torch.arange(8), 4, 8, torch.Generator().manual_seed(0))
    assert windows.tolist() == [list(range(8))] * 4
