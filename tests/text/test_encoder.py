"""Which token begins a text, which tokens a model knows, and tokenizers that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.evaluation.options import EvaluationOptions
from secateur.report.documents.evaluation import Protocol
from secateur.runs.errors import SecateurError
from secateur.text.beginning import Beginning, beginning_text
from secateur.text.calibration import load_calibration, read_calibration
from secateur.text.encoder import Encoder
from secateur.text.options import CalibrationOptions
from secateur.text.packing import begin_text, consecutive_windows, draw_windows
from secateur.text.sources import find_texts
from secateur.text.training import load_text
from secateur.training.options import Training
from tiny import make_tokenizer


def adding(template: str = "<s> $A", **tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around a text by itself."""
    tokenizer = make_tokenizer()
    names = [word for word in template.split() if word.startswith("<")]
    special = [(name, int(tokenizer.convert_tokens_to_ids(name))) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "asked", "bos", "first"),
    [
        (make_tokenizer(), None, "none", None),
        (make_tokenizer(), "window", "window", "<s>"),
        (make_tokenizer(), "text", "text", "<s>"),
        (adding(), None, "window", "<s>"),
        (adding(), "text", "text", "<s>"),
        (adding(), "none", "none", None),
        (adding("<s> $A </s>"), None, "window", "<s>"),
        (adding("$A </s>"), None, "none", None),
        # The token of some families is that which ends a text, or has no role at all.
        (adding("</s> $A"), None, "window", "</s>"),
        (adding("<unk> $A", bos_token=None), None, "window", "<unk>"),
        (adding("<unk> <s> $A"), None, "window", "<s>"),
    ],
)
def test_the_token_that_begins_a_text(
    tokenizer: PreTrainedTokenizerBase, asked: Beginning | None, bos: str, first: str | None
) -> None:
    encoder = Encoder.of(tokenizer, asked)
    assert (encoder.bos, encoder.name(encoder.first)) == (bos, first)
    plain = encoder.encode(["a b"])[0]
    assert encoder.begun("a b") == ([] if first is None else [encoder.first]) + plain
    assert encoder.begun("<s>a") == encoder.encode(["<s>a"])[0] or first not in (None, "<s>")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(True, "window"), (False, "none"), (None, None), ("text", "text"), ("none", "none")],
)
def test_earlier_forms_are_read(given: object, expected: str | None) -> None:
    for model in (CalibrationOptions, EvaluationOptions):
        assert model.from_mapping({"bos": given}).bos == expected
    assert Training.from_mapping({"bos": given, "tokens": 10**6}).bos == expected


def test_a_place_that_there_is_not() -> None:
    with pytest.raises(SecateurError, match=r"bos is not valid: .*'window', 'text' or 'none'"):
        CalibrationOptions.from_mapping({"bos": "windows"})


def test_protocols_of_earlier_versions_are_read() -> None:
    values: dict[str, Any] = dict.fromkeys(Protocol.model_fields, 1)
    words = ("text", "text_sha256", "tokenizer", "forward_dtype", "device")
    values |= dict.fromkeys(words, "x") | {"bos": "each window"}
    assert Protocol.model_validate(values).bos == "window"
    assert beginning_text("each window") == beginning_text(True) == beginning_text("window")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 6, 7, 8, 9], [[1, 5, 6], [1, 7, 8]]),
        # Where the text has the token at that place, it is not doubled.
        ([1, 5, 6, 7, 8, 9], [[1, 5, 6], [1, 7, 8]]),
        ([5, 6, 1, 7, 8, 9, 4], [[1, 5, 6], [1, 7, 8], [1, 9, 4]]),
        ([5, 1, 6, 7, 8], [[1, 5, 1], [1, 6, 7]]),
        ([5, 6, 1, 7], [[1, 5, 6]]),
    ],
)
def test_windows_that_begin_with_a_token(tokens: list[int], expected: list[list[int]]) -> None:
    tokens_N = torch.tensor(tokens, dtype=torch.int32)
    assert consecutive_windows(tokens_N, 3, 1).tolist() == expected
    if len(tokens) < 3:
        return
    drawn_WL = draw_windows(tokens_N, 50, 3, torch.Generator().manual_seed(0), 1)
    assert (drawn_WL[:, 0] == 1).all()
    text = [1, *tokens]
    for window in drawn_WL.tolist():
        assert any(window[1:] == text[at : at + 2] for at in range(len(text) - 1))
    if tokens[0] == 1:
        assert [1, 1, 5] not in drawn_WL.tolist()


def test_the_head_of_a_text_is_put_once() -> None:
    assert begin_text(torch.tensor([5, 6]), 1).tolist() == [1, 5, 6]
    assert begin_text(torch.tensor([1, 6]), 1).tolist() == [1, 6]
    assert begin_text(torch.tensor([5, 6]), None).tolist() == [5, 6]


def test_the_default_is_the_tokenizers_everywhere(
    json_lines: Callable[..., Path], writer: LlamaForCausalLM
) -> None:
    path = json_lines(["The cat sat on a mat. " * 9])
    encoder = Encoder.of(adding())
    for source in (str(path), "self"):
        options = CalibrationOptions(source=source, samples=4, length=8)
        found = load_calibration(options, adding(), model_loader=lambda: writer)
        assert found.description["bos"] == "window"
        assert (found.tokens[:, 0] == encoder.first).all()
        assert not (found.tokens[:, 1] == encoder.first).any() or source == "self"
    parts = find_texts([str(path)])
    text = load_text(parts, encoder, windows=4, held_out=2, length=8, seed=0)
    assert (torch.cat([text.train_WL, text.held_out_WL])[:, 0] == encoder.first).all()
    once = Encoder.of(adding(), "text")
    text = load_text(parts, once, windows=20, held_out=4, length=8, seed=0)
    assert int((torch.cat([text.train_WL, text.held_out_WL]) == encoder.first).sum()) == 1


def test_tokens_that_the_model_has_no_row_for(
    json_lines: Callable[..., Path], tmp_path: Path
) -> None:
    lines, plain = json_lines(["Short."] * 90), tmp_path / "plain.txt"
    plain.write_text("Long. " * 200)
    longer, begun = make_tokenizer(), make_tokenizer()
    longer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    begun.add_special_tokens({"bos_token": "<first>"})
    cases: list[tuple[PreTrainedTokenizerBase, dict[str, Any]]] = [
        (longer, {"source": str(lines)}),
        (longer, {"source": "self"}),
        (longer, {"source": {"self": 1, str(plain): 1}}),
        (begun, {"source": str(plain), "bos": "window"}),
    ]
    for tokenizer, values in cases:
        options = CalibrationOptions(samples=8, length=16, **values)
        with pytest.raises(SecateurError, match=r"of number 260, and .* embedding has 260 rows"):
            read_calibration(options, Encoder.of(tokenizer, options.bos, 260))
    # A token that is never used needs no row.
    options = CalibrationOptions(source=str(plain), samples=8, length=16)
    read_calibration(options, Encoder.of(longer, None, 260))


class Panic(BaseException):
    """What a panic in Rust code is in Python."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize("error", [TypeError("no text"), KeyError("a"), Panic("unwrap"), OSError()])
def test_a_tokenizer_that_fails(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.of(make_tokenizer())

    def fail(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(type(encoder.tokenizer), "__call__", fail)
    with pytest.raises(SecateurError, match="tokenizer cannot make tokens of the text"):
        encoder.encode(["a"])


def test_a_stop_is_no_failure_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.of(make_tokenizer())

    def stop(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(encoder.tokenizer), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(["a"])
