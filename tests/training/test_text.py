"""Training text: its order, its sources, and when there is too little of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from secateur.errors import SecateurError
from secateur.training.text import TrainingText, find_texts, load_text


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
        tokenizer,
        windows=windows,
        held_out=5,
        length=10,
        seed=seed,
    )


def test_folders_give_their_text_files_by_name(folder: Path) -> None:
    found = find_texts([str(folder / "b.txt"), str(folder)])
    assert [path.name for path in found if isinstance(path, Path)] == [
        "b.txt",
        "b.txt",
        "a.jsonl.gz",
    ]


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
    [([], "needs text"), (["EMPTY"], "holds no text files"), (["missing.txt"], "There is no file")],
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
