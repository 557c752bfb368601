from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest
import torch

from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.text import Passage, read_dataset, read_text, split_windows
from secateur.runs.errors import SecateurError
from secateur.text.encoder import Encoder
from tiny import make_tokenizer


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b" \n = Title = \r\n two words \n")
    text = read_text(path)
    assert (text.name, text.words) == ("text.txt", 5)
    assert text.content == " \n = Title = \r\n two words \n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_texts_of_json_lines_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two\n", "3")))
    assert read_text(path).content == "one\n\ntwo\n\n\n3"


def test_the_rows_of_a_dataset_are_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*place: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((*place, split))
        rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": " A line . \n"}]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = "\n\n = Title = \n\n\n A line . \n"
    text = read_dataset("wikitext2")
    assert (text.name, text.content) == ("Salesforce/wikitext:wikitext-2-raw-v1:test", expected)
    assert read_dataset("user/name::validation").content == expected
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("user/name", None, "validation"),
    ]


def test_an_endless_dataset_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"text": "12345"}] * 9).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr("secateur.evaluation.text._HUB_CHARACTERS", 12)
    assert read_dataset("user/name").content == "12345\n\n12345\n\n12345"


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.text._FILE_CHARACTERS", 12)
    (tmp_path / "text.txt").write_text("x" * 13)
    (tmp_path / "texts.jsonl").write_text('{"text": "1234567"}\n' * 9)
    for name in ("text.txt", "texts.jsonl"):
        with pytest.raises(
            SecateurError, match=f"{name} has more than 12 characters; evaluate fewer"
        ):
            read_text(tmp_path / name)


@pytest.mark.parametrize("form", [".txt", ".txt.gz", ".jsonl"])
def test_few_windows_of_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("secateur.evaluation.text._SOME_CHARACTERS", 50)
    words = "the cat sat on a mat " * 500
    path = tmp_path / f"long{form}"
    content = words if form != ".jsonl" else json.dumps({"text": words}) + "\n"
    path.write_bytes(gzip.compress(content.encode()) if form == ".txt.gz" else content.encode())
    encoder = Encoder.of(make_tokenizer())
    options = {"text": path, "window": 8}
    whole = Passage.read(EvaluationOptions(**options), encoder)
    some = Passage.read(EvaluationOptions(**options, max_windows=3), encoder)
    assert torch.equal(some.windows_WL, whole.windows_WL[:3])
    assert (whole.text.whole, some.text.whole) == (True, False)
    assert len(some.text.content) < len(words) / 10
    # Once the windows need it all, all of it is read, and nothing is refused that could be.
    all_of_it = Passage.read(EvaluationOptions(**options, max_windows=10**9), encoder)
    assert torch.equal(all_of_it.windows_WL, whole.windows_WL)
    assert all_of_it.text == whole.text


def test_a_text_of_long_tokens_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.text._SOME_CHARACTERS", 50)
    path = tmp_path / "long.txt"
    path.write_text("the cat sat on a mat " * 500)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["the cat sat on a mat "])
    options = EvaluationOptions(text=path, window=64, max_windows=5)
    assert Passage.read(options, Encoder.of(tokenizer)).windows_WL.shape == (5, 64)


@pytest.mark.parametrize("name", ["none.txt", "none", "user/none", "./none"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(SecateurError, match=f"There is no file {name}"):
        read_text(name)


def test_a_dataset_is_no_file_name() -> None:
    with pytest.raises(SecateurError, match="not of the form USER/NAME"):
        read_dataset("text.txt")


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(SecateurError, match=r"evaluation text text\.txt is empty"):
        read_text(tmp_path / "text.txt")


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    windows = split_windows(torch.arange(11), 3)
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert split_windows(torch.arange(11), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bos_counts_as_a_token_of_its_window() -> None:
    windows = split_windows(torch.arange(10, 17), 4, bos=1)
    assert windows.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15]]


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(SecateurError, match="has 7 tokens and one window needs 8"):
        split_windows(torch.arange(7), 8)


@pytest.mark.parametrize(("window", "max_windows"), [(1, None), (0, 3), (8, 0), (8, -1)])
def test_windows_that_predict_nothing(window: int, max_windows: int | None) -> None:
    with pytest.raises(SecateurError, match="predict nothing"):
        split_windows(torch.arange(100), window, max_windows)
