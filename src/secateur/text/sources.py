"""Documents from whatever the user names: a text file, a file of JSON lines, a hub data set."""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from secateur.runs.errors import SecateurError

SOURCES = {
    "self": "text that the dense model writes itself; needs no data",
    "FILE.txt": "a text file, as one document (.txt.gz too)",
    "FILE.jsonl": "one JSON object per line with the document under 'text' (.jsonl.gz too)",
    "wikitext2": "WikiText-2 from the Hugging Face hub",
    "c4": "C4, English, from the Hugging Face hub",
    "USER/NAME[:CONFIG][:SPLIT]": "any data set of the Hugging Face hub with a column of text",
    "{SOURCE: WEIGHT, ...}": "a mix, in a recipe; weights are relative shares of the samples",
}
"""What a source can be, each with one line of help."""

SELF = "self"

TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub.

    Attributes:
        name: ``user/name``.
        config: its configuration, if it has several.
        split: its part, if the user named one.
        one_text: its rows are the lines of one text rather than documents.
    """

    name: str
    config: str | None = None
    split: str | None = None
    one_text: bool = False

    def label(self, split: str) -> str:
        """Name, configuration and split; ``split`` is taken if the user named none."""
        return ":".join(part for part in (self.name, self.config, self.split or split) if part)


_SHORT_NAMES = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", one_text=True),
    "c4": HubDataset("allenai/c4", "en"),
}


def resolve_source(source: str) -> Path | HubDataset:
    """Tell files from hub names.

    Raises:
        SecateurError: it is neither an existing text file nor formed like a hub name.
    """
    return find_file(source) or find_dataset(source)


def find_file(source: str) -> Path | None:
    """Return the text file of that name, or None if it is not the name of a file.

    Raises:
        SecateurError: the file is missing, or of another kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise SecateurError(f"{source} is a folder; name a .txt or .jsonl file in it.")
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise SecateurError(
                f"{source} is neither .txt nor .jsonl; rename it to what it holds, or convert it."
            )
        return path
    if path.name.endswith(TEXT_SUFFIXES) or source.startswith(("/", ".", "~")):
        raise SecateurError(f"There is no file {source}; {_nearest_file(path)}.")
    return None


def find_dataset(source: str) -> HubDataset:
    """Return the hub data set of that name; whether it exists shows when it is read.

    Raises:
        SecateurError: the name is not formed like one.
    """
    name, _, rest = source.partition(":")
    if name in _SHORT_NAMES:
        if ":" in rest:
            raise SecateurError(f"{source} has too many parts; write {name} or {name}:SPLIT.")
        return replace(_SHORT_NAMES[name], split=rest or None)
    parts = rest.split(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or len(parts) > 2:
        choices = [SELF, *_SHORT_NAMES]
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else "check the path."
        raise SecateurError(
            f"{source} is no file, none of {', '.join(choices)}, and not of the form "
            f"USER/NAME[:CONFIG][:SPLIT] of a hub data set; {hint}"
        )
    one_text = any(name == known.name and known.one_text for known in _SHORT_NAMES.values())
    return HubDataset(name, parts[0] or None, parts[1] if parts[1:] else None, one_text)


Render = Callable[[list[dict[str, str]]], str]
"""From the messages of a conversation to its text."""


def read_documents(
    source: Path | HubDataset, *, split: str, characters: int = -1, render: Render | None = None
) -> Iterator[str]:
    """Yield the documents of a source in their order.

    Args:
        source: from ``resolve_source``.
        split: part of a hub data set that names none itself.
        characters: stop after about so many in a source that is one text; -1 reads all of it.
        render: makes texts of conversations; without it a line of them is refused.

    Raises:
        SecateurError: the source cannot be read; the message names the place.
    """
    if isinstance(source, HubDataset):
        texts = _hub_texts(source, split)
        return _joined(texts, characters) if source.one_text else texts
    if ".jsonl" in source.suffixes[-2:]:
        return _json_lines(source, render)
    return _whole_text(source, characters)


def _joined(texts: Iterator[str], characters: int) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if 0 <= characters < size:
            break
    yield "\n\n".join(parts)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either, check the path"
    names = [entry.name for entry in path.parent.iterdir() if entry.name.endswith(TEXT_SUFFIXES)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}" if near else "check the path"


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _whole_text(path: Path, characters: int) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield file.read(characters)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path, render: Render | None) -> Iterator[str]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, f"Line {number} of {path}", render)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _text_of(line: str, place: str, render: Render | None) -> str:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise SecateurError(f"{place} is not valid JSON ({error}); mend or remove it.") from error
    if not isinstance(item, dict):
        raise SecateurError(f'{place} is not an object; write {{"text": "..."}}.')
    if render is not None and "text" not in item and "messages" in item:
        return render(_messages_of(item["messages"], place))
    if "text" not in item:
        keys = ", ".join(map(str, item)) or "none"
        raise SecateurError(f"{place} has no 'text', its keys are: {keys}; rename the text's key.")
    text = item["text"]
    if not isinstance(text, str):
        raise SecateurError(f"{place} has a 'text' that is no string; write it as one.")
    return text


def _messages_of(messages: object, place: str) -> list[dict[str, str]]:
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise SecateurError(
        f"{place} has 'messages' that are no conversation; write "
        '[{"role": "user", "content": "..."}, ...].'
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )


def _unreadable(path: Path, error: Exception) -> SecateurError:
    if isinstance(error, UnicodeDecodeError):
        return SecateurError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8.")
    return SecateurError(f"{path} cannot be read ({error}); check the file.")


def _hub_texts(dataset: HubDataset, split: str) -> Iterator[str]:
    from datasets import load_dataset

    label = dataset.label(split)
    try:
        rows = load_dataset(
            dataset.name, dataset.config, split=dataset.split or split, streaming=True
        )
        column = None
        for row in rows:
            column = column or _text_column(row, label)
            yield row[column] or ""
    except SecateurError:
        raise
    except Exception as error:  # the hub, its formats and the network fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SecateurError(
            f"The hub data set {label} cannot be read ({reason.rstrip('.')}); check its name, "
            "configuration and split and the network, or use a local file."
        ) from error


def _text_column(row: dict[str, object], label: str) -> str:
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    raise SecateurError(
        f"The hub data set {label} has no column 'text' and not just one column of strings "
        f"(its columns are: {', '.join(row)}); save its texts as a .jsonl file and use that."
    )
