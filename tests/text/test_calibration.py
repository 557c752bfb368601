from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.text.beginning import Beginning
from secateur.text.calibration import load_calibration, read_calibration, source_files
from secateur.text.encoder import Encoder
from secateur.text.options import CalibrationOptions
from secateur.text.sources import SOURCES

TEXTS = ["The cat sat on a mat. " * 5, "Dogs ran to the red house. " * 5, "By the sea. " * 9]


def test_windows_of_packed_documents_by_hand(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = json_lines(TEXTS)
    options = CalibrationOptions(source=str(path), samples=9, length=16, seed=5)
    calibration = load_calibration(options, tokenizer)
    stream: list[int] = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream += ([tokenizer.eos_token_id] if stream else []) + ids
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(0, len(stream) - 16 + 1, (9,), generator=generator)
    expected = torch.tensor([stream[start : start + 16] for start in starts.tolist()])
    assert torch.equal(calibration.tokens, expected)
    assert calibration.tokens.dtype == torch.int64


def test_the_description_says_what_the_text_was(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = json_lines(TEXTS)
    options = CalibrationOptions(source=str(path), samples=8, length=16)
    calibration = load_calibration(options, tokenizer)
    ids = b"".join(token.to_bytes(8, "little") for token in calibration.tokens.flatten().tolist())
    available = sum(len(text) for text in TEXTS) + 2
    assert json.loads(json.dumps(calibration.description)) == {
        "source": str(path),
        "samples": 8,
        "length": 16,
        "seed": 0,
        "bos": "none",
        "tokens": 128,
        "sha256": hashlib.sha256(ids).hexdigest(),
        "parts": [
            {
                "source": str(path),
                "samples": 8,
                "documents": 3,
                "available_tokens": available,
                "capped": False,
                "separator": "</s>",
            }
        ],
    }


def test_a_mix_packs_each_source_apart_and_shuffles(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    low, high = json_lines(["abc" * 50], "low.jsonl"), json_lines(["XYZ" * 50], "high.jsonl")
    mix = {str(low): 3.0, str(high): 1.0}
    options = CalibrationOptions(source=mix, samples=16, length=8)
    calibration = load_calibration(options, tokenizer)
    texts = tokenizer.batch_decode(calibration.tokens)
    is_low = [set(text) <= set("abc") for text in texts]
    assert sum(is_low) == 12
    assert all(low or set(text) <= set("XYZ") for low, text in zip(is_low, texts, strict=True))
    assert is_low != sorted(is_low) and is_low != sorted(is_low, reverse=True)
    assert [part["samples"] for part in calibration.description["parts"]] == [12, 4]
    again = load_calibration(options, tokenizer)
    assert torch.equal(again.tokens, calibration.tokens)
    other = load_calibration(options.model_copy(update={"seed": 1}), tokenizer)
    assert not torch.equal(other.tokens, calibration.tokens)


def test_self_written_text_drops_the_least_likely(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = CalibrationOptions(samples=8, length=12)
    torch.manual_seed(1)
    first = load_calibration(options, tokenizer, model_loader=lambda: writer)
    torch.manual_seed(2)
    second = load_calibration(options, tokenizer, model_loader=lambda: writer)
    assert torch.equal(first.tokens, second.tokens)
    assert first.tokens.shape == (8, 12)
    (part,) = first.description["parts"]
    assert (part["written"], part["dropped"], part["start"]) == (10, 2, "</s>")
    assert part["log_likelihood_kept"] > part["log_likelihood_written"]


def test_self_can_be_part_of_a_mix(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, json_lines: Callable[..., Path]
) -> None:
    options = CalibrationOptions(
        source={"self": 1, str(json_lines(TEXTS)): 1}, samples=6, length=12
    )
    calibration = load_calibration(options, tokenizer, model_loader=lambda: writer)
    assert calibration.tokens.shape == (6, 12)
    assert (calibration.tokens[:, 0] == tokenizer.eos_token_id).sum() >= 3


def test_the_model_is_loaded_only_to_write(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    def load() -> LlamaForCausalLM:
        raise AssertionError("not needed")

    options = CalibrationOptions(source=str(json_lines(TEXTS)), samples=4, length=8)
    load_calibration(options, tokenizer, model_loader=load)


@pytest.mark.parametrize("source", ["self", "file"])
def test_windows_may_begin_with_bos(
    writer: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    json_lines: Callable[..., Path],
    source: str,
) -> None:
    name = str(json_lines(TEXTS)) if source == "file" else source
    options = CalibrationOptions(source=name, samples=4, length=8, bos="window")
    tokens = load_calibration(options, tokenizer, model_loader=lambda: writer).tokens
    assert tokens.shape == (4, 8)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()


def test_source_files_are_the_local_ones(json_lines: Callable[..., Path]) -> None:
    path = json_lines(TEXTS)
    options = CalibrationOptions(source={"self": 1, "wikitext2": 1, str(path): 1})
    assert source_files(options) == [path]


def test_every_kind_of_source_is_described() -> None:
    assert {"self", "wikitext2", "c4"} < set(SOURCES)


def test_a_missing_file_is_noticed_before_the_model_writes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = CalibrationOptions(source={"self": 1, str(tmp_path / "none.txt"): 1})
    with pytest.raises(SecateurError, match=r"There is no file .*none\.txt"):
        load_calibration(options, tokenizer)


def test_text_that_is_too_short_says_how_much_is_missing(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    options = CalibrationOptions(source=str(json_lines(["five."])), samples=4, length=8)
    with pytest.raises(SecateurError, match="has 5 tokens and a window needs 8"):
        load_calibration(options, tokenizer)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_text(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    options = CalibrationOptions(source=str(json_lines(texts)), samples=4, length=8)
    with pytest.raises(SecateurError, match=r"calibration text .* is empty"):
        load_calibration(options, tokenizer)


def test_a_folder_is_all_its_files_by_name(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = load_calibration(
        CalibrationOptions(source=str(json_lines(TEXTS)), samples=4, length=8), tokenizer
    )
    (json_lines(TEXTS).parent / "parts").mkdir()
    json_lines(TEXTS[:1], "parts/a.jsonl")
    path = json_lines(TEXTS[1:], "parts/b.jsonl.gz")
    options = CalibrationOptions(source=str(path.parent), samples=4, length=8)
    assert [file.name for file in source_files(options)] == ["a.jsonl", "b.jsonl.gz"]
    assert torch.equal(load_calibration(options, tokenizer).tokens, whole.tokens)


def test_what_needs_no_model_is_read_before_one_is_at_hand(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, json_lines: Callable[..., Path]
) -> None:
    path = json_lines(TEXTS)
    options = CalibrationOptions(source={"self": 1, str(path): 1}, samples=6, length=12)
    draft = read_calibration(options, Encoder.of(tokenizer))
    path.unlink()
    json_lines(TEXTS)
    expected = load_calibration(options, tokenizer, model_loader=lambda: writer)
    path.unlink()
    assert torch.equal(draft.complete(lambda: writer).tokens, expected.tokens)
    path.write_text('{"content": "no text"}')
    with pytest.raises(SecateurError, match=r"Line 1 of .* has no 'text'"):
        read_calibration(options, Encoder.of(tokenizer))


def test_self_without_a_model(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SecateurError, match="needs the dense model"):
        load_calibration(CalibrationOptions(length=8), tokenizer)


def test_a_source_whose_share_rounds_to_nothing(
    json_lines: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    low, high = json_lines(TEXTS, "low.jsonl"), json_lines(TEXTS, "high.jsonl")
    options = CalibrationOptions(source={str(low): 99, str(high): 1}, samples=8, length=8)
    with pytest.raises(SecateurError, match=r"high\.jsonl gets none of the 8 calibration samples"):
        load_calibration(options, tokenizer)


@pytest.mark.parametrize("bos", [None, "window", "text"])
def test_a_tokenizer_without_special_tokens(
    writer: LlamaForCausalLM, bare_tokenizer: PreTrainedTokenizerBase, bos: Beginning | None
) -> None:
    options = CalibrationOptions(samples=4, length=8, bos=bos)
    message = "no beginning-of-text token" if bos else "no special token to begin a text with"
    with pytest.raises(SecateurError, match=message):
        load_calibration(options, bare_tokenizer, model_loader=lambda: writer)
