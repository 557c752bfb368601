from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from secateur.runs.errors import SecateurError
from secateur.text import documents
from secateur.text.documents import read_documents
from secateur.text.sources import HubDataset, find_texts, resolve_source


def read(source: Path, characters: int = -1) -> list[str]:
    return list(read_documents(resolve_source(str(source)), split="train", characters=characters))


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("One.\r\n\r\nTwo – with blank lines.\n".encode())
    assert read(path) == ["One.\r\n\r\nTwo – with blank lines.\n"]


def test_a_text_file_is_read_no_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdef")
    assert read(path, characters=4) == ["abcd"]


def test_a_compressed_text_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"words"))
    assert read(path) == ["words"]


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz"])
def test_json_lines_are_documents(json_lines: Callable[..., Path], name: str) -> None:
    assert read(json_lines(["one", "two\nlines", ""], name)) == ["one", "two\nlines", ""]


def test_blank_lines_between_json_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x", "id": 3}', r"Line 2 of .* has no 'text', its keys are: content, id"),
        ("{}", r"Line 2 of .* has no 'text', its keys are: none"),
        ('{"text": 3}', r"Line 2 of .* has a 'text' that is no string"),
        ('["x"]', r"Line 2 of .* is not an object"),
        ('{"text": "x', r"Line 2 of .* is not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", r"Line 2 of .* is not valid JSON"),
        ("[" * 100_000, r"Line 2 of .* is not valid JSON"),
        (r'{"text": "\ud800 a"}', r"Line 2 of .* holds half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SecateurError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(SecateurError, match="is not UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["text.txt.gz", "text.jsonl.gz"])
def test_a_truncated_archive(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "words"}\n' * 1000)[:-20])
    with pytest.raises(SecateurError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize("name", ["text.txt.gz", "text.jsonl.gz"])
def test_an_archive_that_is_damaged_inside(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    damaged = bytearray(gzip.compress(b'{"text": "words"}\n' * 1000 + os.urandom(9999)))
    damaged[40:60] = b"x" * 20
    path.write_bytes(damaged)
    with pytest.raises(SecateurError, match=rf"{name} (cannot be read|is not UTF-8)"):
        read(path)


def test_a_line_without_end_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_LONGEST_LINE", 30)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "' + "x" * 30 + '"}\n')
    with pytest.raises(SecateurError, match=r"Line 2 of .* is longer than 30 characters"):
        read(path)


@pytest.mark.parametrize("name", ["~nosuchuser/text.txt", "x" * 5000 + ".txt"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(SecateurError, match=r"cannot be looked up|There is no file"):
        resolve_source(name)


def test_a_missing_file_brings_the_nearest_one_to_mind(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(SecateurError, match=r"There is no file .*; did you mean .*corpus\.jsonl"):
        resolve_source(str(tmp_path / "corpsu.jsonl"))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="there is no folder"):
        resolve_source(str(tmp_path / "data" / "corpus.txt"))


def test_a_path_without_a_known_ending_is_no_hub_name() -> None:
    with pytest.raises(SecateurError, match=r"There is no file \./corpus; check the path"):
        resolve_source("./corpus")


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl.gz"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SecateurError, match=r"pipe\..* is no regular file"):
        resolve_source(str(tmp_path / name))
    with pytest.raises(SecateurError, match="holds no text files"):
        find_texts(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("the cat".encode("utf-16-le"), "holds NUL characters"),
        ("the cat".encode("utf-16"), "is not UTF-8"),
        (b"PAR1\0\0\0\0\x15\xff", "is not UTF-8"),
    ],
)
def test_data_that_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(SecateurError, match=message):
        read(path)


def test_the_last_ending_says_how_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl.txt"
    path.write_text("no JSON at all")
    assert read(path) == ["no JSON at all"]


def test_folders_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="is a folder"):
        resolve_source(str(tmp_path))
    (tmp_path / "table.csv").touch()
    with pytest.raises(SecateurError, match=r"is neither \.txt nor \.jsonl"):
        resolve_source(str(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("wikitext2", HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", None, one_text=True)),
        (
            "wikitext2:validation",
            HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", one_text=True),
        ),
        ("c4", HubDataset("allenai/c4", "en")),
        ("user/name", HubDataset("user/name")),
        ("user/name:config", HubDataset("user/name", "config")),
        ("user/name:config:split", HubDataset("user/name", "config", "split")),
        ("user/name::split", HubDataset("user/name", None, "split")),
        (
            "Salesforce/wikitext:wikitext-103-raw-v1",
            HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", None, one_text=True),
        ),
    ],
)
def test_hub_names(source: str, expected: HubDataset) -> None:
    assert resolve_source(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitex2", "did you mean wikitext2"),
        ("sefl", "did you mean self"),
        ("some words", "not of the form USER/NAME"),
        ("user/name:a:b:c", "not of the form USER/NAME"),
        ("c4:en:train", "c4 or c4:SPLIT"),
    ],
)
def test_names_that_cannot_be_anything(source: str, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        resolve_source(source)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, object]]], None]:
    """Let the hub hold a data set of these rows, whatever it is asked for."""

    def hold(rows: list[dict[str, object]]) -> None:
        dataset = datasets.Dataset.from_list(rows).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)

    return hold


def test_the_text_column_of_a_hub_dataset(hub: Callable[..., None]) -> None:
    hub([{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
    assert list(read_documents(HubDataset("user/name"), split="train")) == ["one", "two"]


def test_the_only_column_of_strings_is_the_text(hub: Callable[..., None]) -> None:
    hub([{"id": 1, "content": "one"}, {"id": 2, "content": None}])
    assert list(read_documents(HubDataset("user/name"), split="train")) == ["one", ""]


def test_several_columns_of_strings_are_named(hub: Callable[..., None]) -> None:
    hub([{"question": "one", "answer": "two", "id": 1}])
    with pytest.raises(SecateurError, match="its columns are: question, answer, id"):
        list(read_documents(HubDataset("user/name"), split="train"))


def test_lines_of_one_text_are_joined(hub: Callable[..., None]) -> None:
    hub([{"text": " = Title = \n"}, {"text": ""}, {"text": "A line.\n"}, {"text": "More.\n"}])
    source = HubDataset("user/name", one_text=True)
    assert list(read_documents(source, split="test")) == [
        " = Title = \n\n\n\n\nA line.\n\n\nMore.\n"
    ]
    short = list(read_documents(source, split="test", characters=12))
    assert short == [" = Title = \n\n\n\n\nA line.\n"]


def test_a_hub_dataset_that_cannot_be_had() -> None:
    with pytest.raises(SecateurError, match=r"The hub data set user/none:train cannot be read \("):
        list(read_documents(HubDataset("user/none"), split="train"))
