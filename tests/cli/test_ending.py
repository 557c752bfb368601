"""How commands end when something outside of them goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import cli


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
    done = end("(_ for _ in ()).throw(OSError(12, 'Cannot allocate memory')).send(None)")
    assert "error The system refuses to go on (cannot allocate memory)" in done.stderr
