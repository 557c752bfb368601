"""Training text: its order, its sources, and when there is too little of it."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.text.encoder import Encoder
from secateur.text.sources import find_texts
from secateur.text.training import TrainingText, load_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("b" * 400)
    (tmp_path / "inner").mkdir()
    with gzip.open(tmp_path / "inner" / "a.jsonl.gz", "wt") as file:
        for letter in "cdef":
            file.write(json.dumps({"text": letter * 99}) + "\n")
    (tmp_path / "notes.md").write_text("not a text")
    return tmp_path


def load(
    folder: Path, tokenizer: PreTrainedTokenizerBase, windows: int = 60, seed: int = 0
) -> TrainingText:
    return load_text(
        find_texts([str(folder)]),
        Encoder.of(tokenizer),
        windows=windows,
        held_out=5,
        length=10,
        seed=seed,
    )


def test_folders_give_their_text_files_by_name(folder: Path) -> None:
    found = find_texts([str(folder / "b.txt"), str(folder)])
    names = [[path.name for path in part.sources if isinstance(path, Path)] for part in found]
    assert names == [["b.txt"], ["b.txt", "a.jsonl.gz"]]


def test_order_is_the_seeds(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (load(folder, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_WL, again.train_WL)
    assert torch.equal(first.held_out_WL, again.held_out_WL)
    assert not torch.equal(first.train_WL, other.train_WL)
    assert first.train_WL.shape == (60, 10)
    assert first.train_WL.dtype == torch.int32


def test_held_out_windows_do_not_depend_on_the_budget(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    few, many = load(folder, tokenizer, windows=60), load(folder, tokenizer, windows=70)
    assert torch.equal(few.held_out_WL, many.held_out_WL)
    assert torch.equal(few.train_WL, many.train_WL[:60])


def test_all_sources_take_part(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = load(folder, tokenizer, windows=74)
    assert [part["windows"] for part in text.parts] == [40, 39]
    assert len(tokenizer("bcdef")["input_ids"]) == 5
    assert set(tokenizer("bcdef")["input_ids"]) <= set(text.train_WL.flatten().tolist())


def test_too_little_text_names_both_numbers(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(SecateurError, match=r"needs 900 tokens and 50 held-out.* has 790"):
        load(folder, tokenizer, windows=90)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "needs text"),
        (["EMPTY"], "holds no text files"),
        (["missing.txt"], "There is no file"),
        (["missing.txt:0.5"], "There is no file"),
        (["c4:0.5", "wikitext2"], "wikitext2 has no weight"),
        (["c4:0"], "The weight of c4 is 0; give a positive number"),
        (["self"], "Only calibration text can be self-written"),
    ],
)
def test_bad_sources(names: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(SecateurError, match=message):
        find_texts([str(tmp_path / name) if name == "EMPTY" else name for name in names])


def test_kept_windows_are_read_back(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = load(folder, tokenizer)
    text.write(tmp_path / "text.safetensors")
    again = TrainingText.read(tmp_path / "text.safetensors")
    assert torch.equal(text.train_WL, again.train_WL)
    assert torch.equal(text.held_out_WL, again.held_out_WL)


def test_weights_are_shares_of_the_windows(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = find_texts([f"{folder / 'b.txt'}:3", f"{folder / 'inner'}:1"])
    assert [part.weight for part in parts] == [3, 1]
    few, many = (
        load_text(parts, Encoder.of(tokenizer), windows=count, held_out=8, length=10, seed=0)
        for count in (20, 32)
    )
    letter = tokenizer("b")["input_ids"][0]
    for text, shares in ((few, (15, 6)), (many, (24, 6))):
        found = [int((w_WL == letter).all(1).sum()) for w_WL in (text.train_WL, text.held_out_WL)]
        assert tuple(found) == shares
    with pytest.raises(SecateurError, match=r"b\.txt has 400"):
        load_text(parts, Encoder.of(tokenizer), windows=52, held_out=8, length=10, seed=0)


def test_validation_text_of_its_own(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("z" * 25)
    parts = find_texts([str(folder)])
    text = load_text(
        parts, Encoder.of(tokenizer), windows=79, held_out=5, length=10, seed=0, validation=own
    )
    assert text.held_out_WL.shape == (2, 10)
    assert set(text.held_out_WL.flatten().tolist()) == set(tokenizer("z")["input_ids"])
    own.write_text("z")
    with pytest.raises(SecateurError, match="less than one window of 10 tokens"):
        load_text(
            parts, Encoder.of(tokenizer), windows=79, held_out=5, length=10, seed=0, validation=own
        )


def test_windows_may_begin_with_bos(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = find_texts([str(folder / "b.txt")])
    plain = load_text(parts, Encoder.of(tokenizer), windows=9, held_out=3, length=10, seed=0)
    begun = Encoder.of(tokenizer, "window")
    text = load_text(parts, begun, windows=9, held_out=3, length=11, seed=0)
    for windows_WL, body_WL in (
        (text.train_WL, plain.train_WL),
        (text.held_out_WL, plain.held_out_WL),
    ):
        assert (windows_WL[:, 0] == tokenizer.bos_token_id).all()
        assert torch.equal(windows_WL[:, 1:], body_WL)


def test_conversations_are_rendered(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    text = load_text(
        find_texts([str(path)]), Encoder.of(speaking), windows=2, held_out=0, length=10, seed=0
    )
    expected = tokenizer("<user>why<assistant>so")["input_ids"][:20]
    assert sorted(text.train_WL.flatten().tolist()) == sorted(expected)
    speaking.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SecateurError, match=r"Line 1 of .* \(roles must alternate\)"):
        load_text(
            find_texts([str(path)]), Encoder.of(speaking), windows=1, held_out=0, length=2, seed=0
        )
    for content, message in [
        ({"messages": messages}, "Line 1 of .*no chat template"),
        ({"messages": []}, "Line 1 of .*no conversation"),
        ({"messages": [{"role": "user"}]}, "no conversation"),
    ]:
        path.write_text(json.dumps(content) + "\n")
        with pytest.raises(SecateurError, match=message):
            load_text(
                find_texts([str(path)]),
                Encoder.of(tokenizer),
                windows=1,
                held_out=0,
                length=2,
                seed=0,
            )
