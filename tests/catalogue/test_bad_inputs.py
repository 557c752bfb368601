"""Every bad input through every command that could take it: a sentence, and nothing else."""

from __future__ import annotations

import os
import shlex
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from catalogue.commands import COMMANDS, problem_of, run, state_of
from catalogue.inputs import EVERYTHING, Bad
from secateur.comparison import run as comparing


@pytest.fixture(scope="session")
def bench(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path], text_file: Path
) -> Path:
    """A folder of good inputs."""
    folder = tmp_path_factory.mktemp("bench-") / "bench"
    for name in ("model", "dense"):
        shutil.copytree(checkpoints("llama"), folder / name)
    shutil.copy(text_file, folder / "text.txt")
    from secateur import Recipe, plan

    short = Recipe.from_mapping({"calibration": {"length": 16}})
    plan(folder / "model", short).write(folder / "good-plan.json")
    return folder


@pytest.mark.parametrize("bad", EVERYTHING, ids=lambda bad: bad.name)
def test_a_bad_input_is_one_sentence(
    bad: Bad,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(bench, folder)
    bad.make(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    # A process of its own would import torch anew, for seconds.
    monkeypatch.setattr(comparing, "apart", lambda function, *arguments: function(*arguments))
    before = state_of(folder)
    faults = []
    for command in commands_of(bad):
        words = shlex.split(f"{COMMANDS.get(command, command)} {bad.more}")
        ended = run(words, capsys)
        problem = problem_of(ended.code, ended.out, ended.err)
        if state_of(folder) != before:
            changed = {*state_of(folder).items()} ^ {*before.items()}
            problem = f"{problem}, changed {sorted(name for name, _ in changed)}"
            pytest.fail(f"{' '.join(words)}: {problem}\n{ended.err[-500:]}")
        if problem:
            faults.append(f"{' '.join(words)[:200]}: {problem}\n{ended.err[-500:]}")
    assert not faults, "\n".join(faults)


def commands_of(bad: Bad) -> list[str]:
    """Two of its commands, other ones for each input; all of them in `make soak`."""
    start = zlib.crc32(bad.name.encode()) % len(bad.commands)
    turned = [*bad.commands[start:], *bad.commands[:start]]
    return turned if os.environ.get("SOAK_CATALOGUE") else turned[:2]


def test_the_catalogue_is_large_and_its_names_differ() -> None:
    names = Counter(each.name for each in EVERYTHING)
    assert not [name for name, count in names.items() if count > 1]
    assert len(names) >= 150
