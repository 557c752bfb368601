"""The commands that inputs go through, as a user would type them."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from secateur import cli

_CALIBRATION = "--calibration text.txt --samples 4 --length 16"
_TRAINING = "--data text.txt --tokens 256 --length 16 --batch-tokens 64"

COMMANDS = {
    "plan": f"plan model -o out.json {_CALIBRATION}",
    "estimate": f"estimate model {_CALIBRATION}",
    "prune": f"prune model -o out --method magnitude {_CALIBRATION}",
    "by recipe": f"prune model -o out {_CALIBRATION}",
    "fit": f"prune model -o out --method wanda {_CALIBRATION}",
    "keep": f"prune model -o out --method keep --refit {_CALIBRATION}",
    "shrink": f"shrink model -o out {_CALIBRATION}",
    "curve": f"shrink model -o out --curve {_CALIBRATION}",
    "train": f"train model -o out {_TRAINING}",
    "recover": f"recover model --teacher dense -o out {_TRAINING}",
    "teach": f"recover dense --teacher model -o out {_TRAINING}",
    "eval": "eval model --text text.txt --window 16",
    "against": "eval dense --against model --text text.txt --window 16",
    "inspect": "inspect model",
    "simulate": "simulate model",
    "report": "report model",
    "export": "export model -o out.gguf",
    "bench": "bench model --batch 1 --prefill 8 --prompt 2 --decode 2 --limit 1",
    "compare": "compare comparison.yaml -o out",
}
"""By name. ``model`` is what is bad, or the same as ``dense``, which is good."""

# A user is to be told within ten seconds; a busy machine is slow, not wrong.
SECONDS = 30


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class _TooLong(BaseException):
    """Nothing on the way may take it for an error."""


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run the command line in this process."""
    capsys.readouterr()
    with _as_a_process(["secateur", *words]), _in_time():
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    printed = capsys.readouterr()
    return Ended(code, printed.out, printed.err)


@contextmanager
def _as_a_process(words: list[str]) -> Iterator[None]:
    """Put back what a process of its own would take with it."""
    before = sys.argv, {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = words
    try:
        yield
    finally:
        sys.argv, handlers = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _in_time() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state_of(folder: Path) -> dict[str, str]:
    """Everything in a folder, links not followed: kind, mode and content."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            status = path.lstat()
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = f"{stat.filemode(status.st_mode)} {content}"
    return found


def problem_of(code: int, out: str, err: str) -> str:
    """What is wrong with how a command ended, nothing if it ended with a sentence."""
    # How the command line is used, its library says.
    if code == 2 and re.search(r"^(Usage|Error): ", err, re.MULTILINE):
        return ""
    if code != 1:
        return f"exit {code}"
    if out:
        return "it printed something"
    # Lines of progress may come before.
    if not re.fullmatch(r"([A-Z][^\n]*: \d[^\n]*\n)*error [^\n]{10,1500}[.?]\n", err):
        return "not one sentence"
    return ""
