"""The one exception a user is meant to read, and how what others raise becomes it."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRACE = "trace.txt"
_KEPT = "The trace is in "
# A reason is part of a sentence.
_LONGEST_REASON = 240
# What the libraries say where memory runs out, whatever type they raise.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
)


class SecateurError(Exception):
    """A problem the user can act on.

    The message is one sentence that names the thing, what was expected and what to do.
    """


@contextmanager
def explained(thing: str, action: str) -> Iterator[None]:
    """Turn whatever others' code raises within into one sentence.

    Args:
        thing: what cannot be done, such as "The configuration in DIR cannot be read".
        action: what to do about it.

    Raises:
        SecateurError: anything was raised but a request to end the process.
    """
    try:
        yield
    except SecateurError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise SecateurError(f"{thing} ({reason_of(error)}); {action}") from error


def reason_of(error: BaseException) -> str:
    """What went wrong, as part of a sentence: short, on one line, without control characters."""
    if is_out_of_memory(error):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    line, *more = [each.strip() for each in str(error).splitlines() if each.strip()] or [""]
    if line.endswith(":") and more:
        line += f" {more[0]}"
    if not line or isinstance(error, KeyError | TypeError | AttributeError | IndexError):
        # These say little without their name.
        line = f"{type(error).__name__}: {line}".rstrip(": ")
    return printable(shortened(line, _LONGEST_REASON)).rstrip(".")


def shortened(text: str, length: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= length else text[:length] + "…"


def printable(text: str) -> str:
    """The text with control characters and halves of characters written out."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or off it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch raises a RuntimeError for both, and nothing large is imported here.
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in said for each in _OUT_OF_MEMORY)


def is_panic(error: BaseException) -> bool:
    """Whether a library that is written in Rust gave up; that is no ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextmanager
def trace_kept(folder: Path) -> Iterator[None]:
    """Keep the trace of an error that nobody foresaw in a folder, for ``kept_trace``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SecateurError):
            with suppress(OSError):
                keep_trace(error, folder)
        raise


def keep_trace(error: BaseException, folder: Path) -> Path:
    """Write the trace of an error into a folder, or where temporary files go if it is closed.

    Raises:
        OSError: neither takes it.
    """
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / TRACE
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        descriptor, name = tempfile.mkstemp(prefix="secateur-", suffix=f"-{TRACE}")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        path = Path(name)
    error.add_note(f"{_KEPT}{path}")
    return path


def kept_trace(error: BaseException) -> Path | None:
    """Where the trace of an error is kept already."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_KEPT)]
    return Path(notes[0].removeprefix(_KEPT)) if notes else None
