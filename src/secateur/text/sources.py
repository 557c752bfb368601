"""The grammar of texts: files, folders and hub data sets, alone or as a weighted mix."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.runs.errors import SecateurError

SOURCES = {
    "self": "text that the dense model writes itself; needs no data; for calibration only",
    "FILE.txt": "a text file, as one document (.txt.gz too)",
    "FILE.jsonl": "one JSON object per line with the document under 'text' (.jsonl.gz too)",
    "FOLDER": "all such files in a folder, by name",
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


Source = Path | HubDataset

_SHORT_NAMES = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", one_text=True),
    "c4": HubDataset("allenai/c4", "en"),
}


@dataclass(frozen=True)
class Part:
    """One named part of a text.

    Attributes:
        name: as the user wrote it, without the weight.
        weight: its share of the windows, relative to that of the others; None without weights.
        sources: one file or hub data set, or the files of a folder; none if the model writes it.
    """

    name: str
    weight: float | None
    sources: tuple[Source, ...]


def find_texts(
    named: str | Sequence[str] | Mapping[str, float], *, own: bool = False
) -> list[Part]:
    """Resolve what the user named to files and hub data sets, in order.

    Args:
        named: one source; or several, each of which may end in ``:WEIGHT``; or weights by source.
        own: the source ``self``, text that the model writes, is possible.

    Raises:
        SecateurError: there is nothing of that name, a folder has no text files, a weight is not
            positive, or only some sources have one.
    """
    if isinstance(named, str):
        weights: list[tuple[str, float | None]] = [(named, None)]
    elif isinstance(named, Mapping):
        weights = list(named.items())
    else:
        weights = [_split_weight(name) for name in named]
    if not weights:
        raise SecateurError("Training needs text; name files, folders or hub data sets.")
    parts = [Part(name, weight, _find_sources(name, own)) for name, weight in weights]
    if len({part.weight is None for part in parts}) > 1:
        bare = next(part.name for part in parts if part.weight is None)
        raise SecateurError(f"{bare} has no weight and others have; write {bare}:WEIGHT.")
    return parts


def resolve_source(source: str) -> Source:
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
    path = _path(source)
    if path.is_dir():
        raise SecateurError(f"{source} is a folder; name a .txt or .jsonl file in it.")
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise SecateurError(
                f"{source} is neither .txt nor .jsonl; rename it to what it holds, or convert it."
            )
        return path
    if path.exists():
        raise SecateurError(f"{source} is no regular file; name a .txt or .jsonl file.")
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


def _find_sources(name: str, own: bool) -> tuple[Source, ...]:
    if name == SELF:
        if own:
            return ()
        raise SecateurError("Only calibration text can be self-written; name a file or data set.")
    folder = _path(name)
    if not folder.is_dir():
        return (resolve_source(name),)
    files = sorted(
        path for path in folder.rglob("*") if path.name.endswith(TEXT_SUFFIXES) and path.is_file()
    )
    if not files:
        raise SecateurError(
            f"The folder {name} holds no text files; put {', '.join(TEXT_SUFFIXES)} into it."
        )
    return tuple(files)


def _split_weight(name: str) -> tuple[str, float | None]:
    bare, colon, number = name.rpartition(":")
    if not colon or _path(name).exists():
        return name, None
    try:
        weight = float(number)
    except ValueError:
        # A configuration or split of a hub data set.
        return name, None
    if not (weight > 0 and math.isfinite(weight)):
        raise SecateurError(f"The weight of {bare} is {number}; give a positive number.")
    return bare, weight


def _path(source: str) -> Path:
    try:
        path = Path(source).expanduser()
        path.exists()
    except (RuntimeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SecateurError(f"{source} cannot be looked up ({reason}); check the path.") from error
    return path


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either, check the path"
    if not os.access(path.parent, os.R_OK):
        return "check the path"
    names = [entry.name for entry in path.parent.iterdir() if entry.name.endswith(TEXT_SUFFIXES)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}" if near else "check the path"
