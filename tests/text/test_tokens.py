"""Tokens that are kept: found again for the same text alone, and never half of them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.text import tokens
from secateur.text.encoder import Encoder
from secateur.text.sources import find_texts
from secateur.text.training import TrainingText, load_text

_CHAT = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One text of 400 characters and several short ones, all of one token per character."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text("abcd" * 100)
    lines = [json.dumps({"text": letter * 90}) for letter in "vwxyz"]
    (folder / "short.jsonl").write_text("\n".join(lines))
    return folder


def load(
    texts: Path, tokenizer: PreTrainedTokenizerBase, cache: Path | None, windows: int = 40
) -> TrainingText:
    parts = find_texts([str(texts)])
    return load_text(
        parts, Encoder.of(tokenizer), windows=windows, held_out=5, length=10, seed=0, cache=cache
    )


def uses(text: TrainingText) -> list[str]:
    """What the cache had to do with each file."""
    return [part["cache"] for part in text.parts]


def assert_same(text: TrainingText, other: TrainingText) -> None:
    assert torch.equal(text.train_WL, other.train_WL)
    assert torch.equal(text.held_out_WL, other.held_out_WL)
    without = [
        [{key: value for key, value in part.items() if key != "cache"} for part in each.parts]
        for each in (text, other)
    ]
    assert without[0] == without[1]


def in_child(work: Callable[[], object]) -> int | None:
    """Exit code of a process that does this."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def test_the_same_text_is_tokenised_once(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    plain = load(texts, tokenizer, None)
    assert uses(plain) == ["unused", "unused"]
    first = load(texts, tokenizer, cache)
    assert uses(first) == ["kept", "kept"]
    files = {path.name: path.read_bytes() for path in cache.iterdir()}
    # Where the text lies and when it was written does not matter.
    moved = texts.rename(tmp_path / "moved")
    again = load(moved, copy.deepcopy(tokenizer), cache)
    assert uses(again) == ["taken", "taken"]
    assert_same(first, plain)
    assert_same(again, plain)
    assert files == {path.name: path.read_bytes() for path in cache.iterdir()}


def test_every_budget_has_the_tokens_it_would_have_read(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # 100 tokens of ten characters: a limit of 100 tokens does not read so far.
    sparse = copy.deepcopy(tokenizer)
    sparse.add_tokens([AddedToken("0123456789", normalized=False)])
    (texts / "dense.txt").write_text("0123456789" * 100)
    expected = {
        1: ["kept", "kept", "kept"],
        20: ["kept", "kept", "kept"],
        5: ["kept", "kept", "kept"],
        40: ["taken", "kept", "kept"],
        60: ["taken", "taken", "kept"],
    }
    plain = {budget: load(texts, sparse, None, windows=budget) for budget in expected}
    for budget, use in expected.items():
        text = load(texts, sparse, tmp_path / "cache", windows=budget)
        assert uses(text) == use, budget
        assert_same(text, plain[budget])
    for budget in expected:
        text = load(texts, sparse, tmp_path / "cache", windows=budget)
        assert uses(text) == ["taken", "taken", "taken"]
        assert_same(text, plain[budget])


def test_another_text_has_other_tokens(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    load(texts, tokenizer, cache)
    path = texts / "long.txt"
    state = path.stat()
    path.write_text("abce" * 100)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = load(texts, tokenizer, cache)
    assert uses(changed) == ["kept", "taken"]
    assert_same(changed, load(texts, tokenizer, None))
    # The same bytes, read in another way.
    (texts / "short.jsonl").rename(texts / "short.txt")
    renamed = load(texts, tokenizer, cache)
    assert uses(renamed) == ["taken", "kept"]
    assert_same(renamed, load(texts, tokenizer, None))


def test_huge_texts_are_known_by_samples_and_time(
    texts: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, path = tmp_path / "cache", texts / "short.jsonl"
    monkeypatch.setattr(tokens, "_DIGESTED", 400)
    load(texts, tokenizer, cache)
    assert uses(load(texts, tokenizer, cache)) == ["taken", "taken"]
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    os.utime(texts / "long.txt", ns=(0, 0))
    assert uses(load(texts, tokenizer, cache)) == ["taken", "kept"]
    path.write_text(path.read_text().replace("v", "u"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = load(texts, tokenizer, cache)
    assert uses(changed) == ["taken", "kept"]
    assert_same(changed, load(texts, tokenizer, None))


def test_another_tokenizer_has_other_tokens(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (texts / "chat.jsonl").write_text("\n".join([json.dumps(_CHAT)] * 40))
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert set(uses(load(texts, speaking, cache))) == {"kept"}
    other_template, other_end, more_tokens = (copy.deepcopy(speaking) for _ in range(3))
    other_template.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    other_end.eos_token = "<s>"
    more_tokens.add_tokens(["abcd"])
    for other in (other_template, other_end, more_tokens):
        text = load(texts, other, cache)
        assert set(uses(text)) == {"kept"}
        assert_same(text, load(texts, other, None))
    assert set(uses(load(texts, speaking, cache))) == {"taken"}


def test_templates_with_the_date_hold_for_a_day(
    texts: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}"

    class Tomorrow(date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2100, 1, 1)

    cache = tmp_path / "cache"
    for tokenizer_ in (dated, tokenizer):
        load(texts, tokenizer_, cache)
        assert uses(load(texts, tokenizer_, cache)) == ["taken", "taken"]
    monkeypatch.setattr(tokens, "date", Tomorrow)
    assert uses(load(texts, dated, cache)) == ["kept", "kept"]
    assert uses(load(texts, tokenizer, cache)) == ["taken", "taken"]


def test_tokenizers_with_code_of_their_own_are_asked_each_time(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    class Own(PreTrainedTokenizerFast):
        pass

    own = Own(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token="</s>")
    for _ in range(2):
        assert uses(load(texts, own, tmp_path / "cache")) == ["unused", "unused"]


def test_a_killed_writer_leaves_nothing_that_is_taken(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    real = safetensors.torch.save_file

    def half(tensors: dict[str, torch.Tensor], path: Path, **others: Any) -> None:
        real(tensors, path, **others)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        safetensors.torch.save_file = half
        load(texts, tokenizer, cache)

    assert in_child(killed) == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.name != "lock"] == [".part"]
    text = load(texts, tokenizer, cache)
    assert uses(text) == ["kept", "kept"]
    assert_same(text, load(texts, tokenizer, None))
    assert not list(cache.glob(".*.part"))


def test_processes_that_write_at_the_same_time(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def work(number: int) -> None:
        together.wait()
        load(texts, tokenizer, tmp_path / "cache").write(tmp_path / f"{number}.safetensors")

    children = [context.Process(target=work, args=(number,)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    expected = load(texts, tokenizer, None)
    for number in range(3):
        text = TrainingText.read(tmp_path / f"{number}.safetensors")
        assert torch.equal(text.train_WL, expected.train_WL)
    again = load(texts, tokenizer, tmp_path / "cache")
    assert uses(again) == ["taken", "taken"]
    assert_same(again, expected)


def test_a_cache_that_cannot_be_used_does_no_harm(
    texts: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = load(texts, tokenizer, None)
    occupied = tmp_path / "a file"
    occupied.write_text("in the way")
    text = load(texts, tokenizer, occupied)
    assert uses(text) == ["unused", "unused"]
    assert_same(text, expected)
    cache = tmp_path / "cache"
    load(texts, tokenizer, cache)
    for path in cache.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size - 4)
    text = load(texts, tokenizer, cache)
    assert uses(text) == ["kept", "kept"]
    assert_same(text, expected)
