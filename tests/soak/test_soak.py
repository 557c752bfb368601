"""Long torment: random kills, aimed kills, runs that meet in one folder, disks that fill up.

Every command ends with the bytes it would have had undisturbed, or is refused in one sentence.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from soak.commands import World
from soak.conftest import Undisturbed
from soak.life import Command, after, changes_of, fresh, result_of

pytestmark = pytest.mark.soak

KILLS, PAIRS, DISKS = (
    int(os.environ.get(f"SOAK_{name}", count))
    for name, count in (("KILLS", 200), ("PAIRS", 200), ("DISKS", 20))
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def test_random_kills(world: World, undisturbed: dict[str, Undisturbed]) -> None:
    dice = random.Random(0)
    names = [*undisturbed]
    for number in range(KILLS):
        name = names[number % len(names)]
        output = fresh(world.root / "killed")
        words = world.commands[name](output)
        # A run may be killed more than once.
        for _ in range(dice.choice((1, 1, 2, 3))):
            delay = dice.uniform(0, undisturbed[name].seconds)
            killed = Command(words, world.root / "killed.log")
            after(delay, killed, dice.choice(SIGNALS))
            assert "Traceback" not in killed.printed(), f"{name}: {killed.printed()}"
        again = Command(words, world.root / "again.log")
        assert again.code() == 0, f"{name} after {delay:.2f} s: {again.printed()}"
        assert result_of(output) == undisturbed[name].result, f"{name} after {delay:.2f} s"


@pytest.mark.parametrize(
    "name", ["prune", "prune mixture", "shrink", "shrink paper", "train adaptive", "recover"]
)
def test_kills_between_all_steps(
    name: str, world: World, undisturbed: dict[str, Undisturbed]
) -> None:
    changes = ("replace", "rename", "mkdir", "rmdir", "unlink")
    log = world.root / "counted.log"
    output = fresh(world.root / "counted")
    assert Command(world.commands[name](output), log, output, None, changes).code() == 0
    total = changes_of(log)
    # A prime stride meets every kind of step; the first and the last ones are all met.
    for at in sorted({*range(12), *range(0, total, 7), *range(total - 40, total)}):
        if not 0 <= at < total:
            continue
        output = fresh(world.root / "aimed")
        words = world.commands[name](output)
        killed = Command(words, world.root / "aimed.log", output, at, changes)
        assert killed.code() == -signal.SIGKILL, f"{at} of {total}: {killed.printed()}"
        again = Command(words, world.root / "again.log")
        assert again.code() == 0, f"{at} of {total}: {again.printed()}"
        assert result_of(output) == undisturbed[name].result, f"{at} of {total}"


def test_pairs_in_one_folder(world: World, undisturbed: dict[str, Undisturbed]) -> None:
    dice = random.Random(1)
    names = [*undisturbed]
    for number in range(PAIRS):
        name = names[number % len(names)]
        output = fresh(world.root / "pair")
        words = world.commands[name](output)
        first = Command(words, world.root / "first.log")
        time.sleep(dice.choice((0.0, 0.0, dice.uniform(0, undisturbed[name].seconds))))
        second = Command(words, world.root / "second.log")
        codes = [first.code(), second.code()]
        for command, code in zip((first, second), codes, strict=True):
            said = command.printed()
            assert code == 0 or (code == 1 and "is in use by process" in said), f"{name}: {said}"
        assert 0 in codes, f"{name}: {first.printed()} {second.printed()}"
        assert result_of(output) == undisturbed[name].result, name


def test_disks_that_fill_up(world: World, undisturbed: dict[str, Undisturbed]) -> None:
    disk = world.root / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a small disk is mounted by root alone")
    dice = random.Random(2)
    for number in range(DISKS):
        name = [*undisturbed][number % len(undisturbed)]
        size = dice.randrange(40, 400) * 1024
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("no disk can be mounted here")
        try:
            words = world.commands[name](disk / "out")
            full = Command(words, world.root / "full.log")
            if full.code() != 0:
                said = full.printed()
                assert full.code() == 1 and "Traceback" not in said, f"{name}: {said}"
                assert "disk" in said, f"{name}: {said}"
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again = Command(words, world.root / "again.log")
            assert again.code() == 0, f"{name}: {again.printed()}"
            assert result_of(disk / "out") == undisturbed[name].result, name
        finally:
            subprocess.run(["umount", str(disk)], check=True)
