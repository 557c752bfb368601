"""How commands end when something outside of them goes wrong."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import cli
from secateur.runs.errors import kept_trace
from secateur.runs.run import Run


def end(work: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with this in the place of the work."""
    code = f"import os, signal, sys\nfrom secateur import cli\ncli.app = lambda: {work}\ncli.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated")]
)
def test_signals_end_with_a_sentence(number: signal.Signals, word: str) -> None:
    kill = f"os.kill(os.getpid(), {int(number)})"
    done = end(kill, "prune")
    assert done.returncode == 128 + number
    assert done.stderr == f"error {word}; the same command goes on from what is saved.\n"
    # Nothing is saved where nothing is made.
    assert end(kill, "inspect").stderr == f"error {word}.\n"


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = (
        "import os, signal\nfrom secateur import cli\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "cli.app = lambda: os.kill(os.getpid(), signal.SIGINT)\ncli.main()\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = end(f"open({str(tmp_path / 'file' / 'below')!r})")
    assert done.returncode == 1
    assert done.stderr == (
        f"error {tmp_path / 'file' / 'below'} cannot be used (not a directory); check the path.\n"
    )


def test_a_home_of_nobody_is_named() -> None:
    result = CliRunner().invoke(cli.app, ["estimate", "~nosuchuser/model"])
    assert "no user whose home folder ~nosuchuser/model could be in" in str(result.exception)


def test_a_refusal_without_a_path_says_why() -> None:
    done = end("(_ for _ in ()).throw(OSError(5, 'Input/output error')).send(None)")
    assert "error The system refuses to go on (input/output error)" in done.stderr


@pytest.mark.parametrize(
    "error",
    ["MemoryError()", "RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')"],
)
def test_too_little_memory_says_what_to_do(error: str) -> None:
    done = end(f"(_ for _ in ()).throw({error}).send(None)")
    assert done.returncode == 1
    assert re.fullmatch(r"error Memory ran out \(.*\); free some, .* needs\.\n", done.stderr)


def test_what_nobody_foresaw_says_so_and_keeps_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    done = end("[][0]")
    assert done.returncode == 70
    assert "Traceback" not in done.stderr
    (trace,) = tmp_path.glob("traces/*/trace.txt")
    assert done.stderr.splitlines() == [
        "error Something went wrong that nobody foresaw (IndexError: list index out of range).",
        f"This is a fault of secateur; please report it to its maintainers together with {trace}.",
    ]
    assert "IndexError: list index out of range" in trace.read_text()
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    assert "Traceback" in end("[][0]").stderr


def test_the_trace_of_a_run_is_kept_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as raised, Run.take(tmp_path / "out", {}, restart=False):
        raise KeyError("x")
    assert kept_trace(raised.value) == tmp_path / "out" / "secateur" / "trace.txt"


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = "print('line\\n' * 100000)"
    work = f"exec({code!r})"
    script = f"from secateur import cli\ncli.app = lambda: {work}\ncli.main()"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" | head -1', sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("line\n", "")
