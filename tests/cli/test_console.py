"""What is printed: paths as they are, and how far work is."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from secateur.cli import console


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("[red]runs[/] :smile:") / ("long" * 40)
    console.say("Saved to ", path, " and [bold]here.")
    console.complain(f"plan.json is no {path}.")
    printed = capsys.readouterr()
    assert printed.out == f"Saved to {path} and [bold]here.\n"
    assert printed.err == f"error plan.json is no {path}.\n"


def test_without_a_terminal_a_phase_is_told_of_while_it_lasts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_BETWEEN_LINES", 0.02)
    with console.progress_bars() as progress:
        progress("Pruning [blocks]", 1, 4)
        time.sleep(0.1)
        progress("Pruning [blocks]", 2, 4)
        time.sleep(0.1)
        progress("Pruning [blocks]", 4, 4)
        progress("At once", 3, 3)
    lines = capsys.readouterr().err.splitlines()
    assert "Pruning [blocks]: 1 of 4, 0:00" in lines
    assert any(re.fullmatch(r"Pruning \[blocks\]: 2 of 4, 0:00, 0:00 left", each) for each in lines)
    assert lines[-1] == "Pruning [blocks]: 4 of 4, 0:00"


def test_without_a_terminal_work_before_the_first_phase_is_told_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_BETWEEN_LINES", 0.02)
    with console.progress_bars():
        time.sleep(0.1)
    assert "At work: 0:00" in capsys.readouterr().err.splitlines()


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("There is no \x1b[2J\r\u202efile; check\nthe path.")
    assert capsys.readouterr().err == "error There is no \\x1b[2J\\r\\u202efile; check\nthe path.\n"


def test_what_is_left_follows_from_the_steps_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    phase = console._Phase("Pruning", done=6, total=10, found=4)
    phase.heard = 1000.0 + 3600
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + 3660)
    assert phase.times == "1:01:00, 1:59:00 left"
    phase.done, phase.heard = 10, 1059.6
    assert phase.times == "1:00"
