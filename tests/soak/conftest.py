"""Inputs, and what each command leaves when nothing disturbs it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from soak.commands import World, make_world
from soak.life import Command, result_of


@dataclass(frozen=True)
class Undisturbed:
    """A command that ran to its end.

    Attributes:
        result: digests by file.
        seconds: how long it took.
    """

    result: dict[str, str]
    seconds: float


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> World:
    made = make_world(tmp_path_factory.mktemp("soak"), text_file)
    words = made.commands["shrink"](made.root / "small")
    command = Command(words, made.root / "small.log")
    assert command.code() == 0, command.printed()
    return made


@pytest.fixture(scope="session")
def undisturbed(world: World) -> dict[str, Undisturbed]:
    """Every command without a fault."""
    found = {}
    for name, words in world.commands.items():
        output = world.root / "whole" / name
        began = time.monotonic()
        command = Command(words(output), world.root / "whole.log")
        assert command.code() == 0, f"{name}: {command.printed()}"
        found[name] = Undisturbed(result_of(output), time.monotonic() - began)
    return found
