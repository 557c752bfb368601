"""The documents of a source, read one after the other."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError, explained, printable, reason_of, shortened
from secateur.text.sources import HubDataset, Source

# Characters of the keys of a line that has no text, as far as a sentence names them.
_LONGEST_KEYS = 200
# Characters of a line; without a limit one file could fill the memory.
_LONGEST_LINE = 2**26


def read_documents(
    source: Source,
    *,
    split: str,
    characters: int = -1,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[str]:
    """Yield the documents of a source in their order.

    Args:
        source: from ``resolve_source``.
        split: part of a hub data set that names none itself.
        characters: stop after about this many in a source that is one text; -1 reads all of it.
        tokenizer: its chat template makes texts of conversations; without it they are refused.

    Raises:
        SecateurError: the source cannot be read; the message names the place.
    """
    if not isinstance(source, HubDataset):
        yield from _texts_in_file(source, characters, tokenizer)
    elif source.one_text:
        yield join_texts(_texts_on_hub(source, split), characters)
    else:
        yield from _texts_on_hub(source, split)


def join_texts(texts: Iterable[str], characters: int = -1) -> str:
    """Join texts by blank lines, up to the first with which they exceed a number of characters."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if 0 <= characters < size:
            break
    return "\n\n".join(parts)


def _texts_in_file(
    path: Path, characters: int, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    try:
        with _open(path) as file:
            if not path.name.endswith((".jsonl", ".jsonl.gz")):
                yield _plain(file.read(characters), path)
                return
            lines = iter(lambda: file.readline(_LONGEST_LINE), "")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(line, f"Line {number} of {path}", tokenizer)
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"The text {path} is not UTF-8 ({error.reason}); convert it to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SecateurError(
            f"The text {path} cannot be read ({reason_of(error)}); check the file."
        ) from error


def _plain(text: str, path: Path) -> str:
    if "\0" in text:
        raise SecateurError(
            f"The text {path} holds NUL characters, as UTF-16 and binary data do; convert it to "
            "UTF-8."
        )
    return text


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _text_of(line: str, place: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if len(line) >= _LONGEST_LINE:
        raise SecateurError(
            f"{place} is longer than {_LONGEST_LINE:,} characters; divide it into documents."
        )
    try:
        item = json.loads(line)
    # A number of thousands of digits is a ValueError, and so is whatever is not JSON.
    except (ValueError, RecursionError) as error:
        raise SecateurError(
            f"{place} is not valid JSON ({reason_of(error)}); mend or remove it."
        ) from error
    if not isinstance(item, dict):
        raise SecateurError(f'{place} is not an object; write {{"text": "..."}}.')
    if tokenizer is not None and "text" not in item and "messages" in item:
        text = _rendered(item["messages"], place, tokenizer)
    elif "text" not in item:
        keys = printable(shortened(", ".join(item), _LONGEST_KEYS)) or "none"
        raise SecateurError(f"{place} has no 'text', its keys are: {keys}; rename the text's key.")
    else:
        text = item["text"]
    if not isinstance(text, str):
        raise SecateurError(f"{place} has a 'text' that is no string; write it as one.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SecateurError(
            f"{place} holds half a character ({error.reason}); mend or remove it."
        ) from error
    return text


def _rendered(messages: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise SecateurError(
            f"{place} has 'messages' that are no conversation; write "
            '[{"role": "user", "content": "..."}, ...].'
        )
    if tokenizer.chat_template is None:
        raise SecateurError(
            f"{place} holds a conversation and the tokenizer has no chat template; give its text "
            "under 'text'."
        )
    with explained(f"{place} does not fit the tokenizer's chat template", "mend or remove it."):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )


def _texts_on_hub(dataset: HubDataset, split: str) -> Iterator[str]:
    from datasets import load_dataset

    label = dataset.label(split)
    with explained(
        f"The hub data set {label} cannot be read",
        "check its name, configuration and split and the network, or use a local file.",
    ):
        rows = load_dataset(
            dataset.name, dataset.config, split=dataset.split or split, streaming=True
        )
        column = None
        for row in rows:
            column = column or _text_column(row, label)
            yield row[column] or ""


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
