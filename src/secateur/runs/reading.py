"""Read small files that others wrote, whatever they hold: a value, or one sentence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from secateur.runs.errors import SecateurError, reason_of

# Configurations and options are kilobytes; the index of the largest models is some megabytes.
_LARGEST_BYTES = 1 << 26
# Aliases let a page of YAML stand for more values than fit in memory.
_MOST_NODES = 100_000
_DEEPEST = 100


def read_text_file(path: Path, noun: str, *, largest: int = _LARGEST_BYTES) -> str:
    """Read a UTF-8 text.

    Args:
        path: the file.
        noun: what sentences call it, such as "The plan".
        largest: bytes that it may have.

    Raises:
        SecateurError: it is missing, no regular file, too large, or no UTF-8 text.
    """
    try:
        # To open a pipe waits for whoever writes into it.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise SecateurError(f"{noun} {path} is a pipe or a device; name a file.")
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise SecateurError(
            f"{noun} {path} cannot be read ({reason_of(error)}); check the path."
        ) from error
    if len(content) > largest:
        raise SecateurError(
            f"{noun} {path} is larger than {largest >> 20} MB, which none is; name the right file."
        )
    try:
        # Some editors begin a text with a byte-order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{noun} {path} is not valid: it is not UTF-8 text; save it as UTF-8."
        ) from error


def parse_json(text: str, named: str, action: str) -> Any:
    """Parse JSON that nests sensibly and says nothing twice.

    Args:
        text: the JSON.
        named: what sentences call it, such as "The plan plan.json".
        action: what to do if it is none.

    Raises:
        SecateurError: it is no such JSON.
    """

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                raise ValueError(f"{key!r} is there twice, with different values")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=members)
    # Numbers of thousands of digits are a ValueError of their own.
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"{named} is not valid JSON ({reason_of(error)}); {action}") from error


def read_json_object(path: Path, noun: str, action: str) -> dict[str, Any]:
    """Read a JSON object from a file; arguments of ``read_text_file`` and ``parse_json``.

    Raises:
        SecateurError: the file cannot be read, or holds no JSON object.
    """
    values = parse_json(read_text_file(path, noun), f"{noun} {path}", action)
    if not isinstance(values, dict):
        raise SecateurError(
            f"{noun} {path} is not valid: a JSON object, {{…}}, was expected; {action}"
        )
    return values


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        ValueError: it is no YAML, or not of plain values, or says a key twice; the message says so.
    """
    try:
        depth = 0
        # Whoever builds nodes and values calls itself, level by level; events are a flat list.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError("it is nested too deeply")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count_nodes(root, {}, 0)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or 'it cannot be parsed'}{place}") from error
    # A tag such as !!int has conversions of its own.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(reason_of(error)) from error


def _count_nodes(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """Values that a node stands for, each alias with all that it repeats."""
    if depth > _DEEPEST:
        # An alias inside of what it names has no end.
        raise ValueError("it is nested too deeply")
    if id(node) not in counted:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys = Counter(str(key.value) for key, _ in node.value)
            twice = next((key for key, count in keys.items() if count > 1), None)
            if twice is not None:
                line = node.start_mark.line + 1
                raise ValueError(f"{twice!r} is there twice in the mapping from line {line} on")
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        counted[id(node)] = 1 + sum(_count_nodes(each, counted, depth + 1) for each in inner)
    if counted[id(node)] > _MOST_NODES:
        raise ValueError("it stands for too many values")
    return counted[id(node)]
