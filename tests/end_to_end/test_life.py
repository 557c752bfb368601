"""The life of a run: killed at any step, met by another run, or damaged."""

from __future__ import annotations

import json
import random
import signal
import stat

import pytest

from soak.commands import World
from soak.conftest import world
from soak.life import Command, after, changes_of, fresh, result_of

__all__ = ["world"]


@pytest.fixture(scope="module")
def whole(world: World) -> dict[str, str]:
    """The result of the plain command, undisturbed."""
    output = world.root / "plain"
    assert Command(world.commands["prune"](output), world.root / "plain.log").code() == 0
    return result_of(output)


@pytest.mark.slow
def test_killed_before_any_file_is_put_in_place(world: World, whole: dict[str, str]) -> None:
    log, output = world.root / "counted.log", fresh(world.root / "counted")
    assert Command(world.commands["prune"](output), log, output).code() == 0
    total = changes_of(log)
    assert total > 20
    # make soak aims between every two.
    for at in {*range(0, total, 6), 1, total - 1, total - 2}:
        output = fresh(world.root / "aimed")
        words = world.commands["prune"](output)
        killed = Command(words, world.root / "aimed.log", output, at)
        assert killed.code() == -signal.SIGKILL, killed.printed()
        again = Command(words, world.root / "again.log")
        assert again.code() == 0, f"{at} of {total}: {again.printed()}"
        assert result_of(output) == whole, f"{at} of {total}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune mixture", "shrink", "train adaptive", "recover"])
def test_killed_at_random(name: str, world: World) -> None:
    words = world.commands[name](fresh(world.root / "whole"))
    assert Command(words, world.root / "whole.log").code() == 0
    expected = result_of(world.root / "whole")
    dice = random.Random(name)
    output = fresh(world.root / "killed")
    words = world.commands[name](output)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        after(dice.uniform(0.5, 2.0), Command(words, world.root / "killed.log"), number)
    again = Command(words, world.root / "again.log")
    assert again.code() == 0, again.printed()
    assert result_of(output) == expected


def test_the_second_of_two_runs_is_refused(world: World, whole: dict[str, str]) -> None:
    output = fresh(world.root / "pair")
    words = world.commands["prune"](output)
    pair = [Command(words, world.root / f"{number}.log") for number in range(2)]
    codes = sorted(each.code() for each in pair)
    assert codes == [0, 1], [each.printed() for each in pair]
    said = next(each.printed() for each in pair if each.code() == 1)
    assert "is in use by process" in said and "Traceback" not in said
    assert result_of(output) == whole


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("flipped", "is damaged or was changed"),
        ("missing", "is missing"),
        ("manifest", "manifest.json is damaged"),
    ],
)
def test_damage_is_named(damage: str, said: str, world: World) -> None:
    output = fresh(world.root / "damaged")
    words = world.commands["prune"](output)
    assert Command(words, world.root / "damaged.log").code() == 0
    shard, manifest = output / "model-00001-of-00004.safetensors", output / "secateur/manifest.json"
    if damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 64
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    else:
        manifest.write_text("{")
    # The finished run notices, and so does one that goes on.
    for finished in (True, False) if damage != "manifest" else (True,):
        if not finished:
            values = json.loads(manifest.read_text())
            values |= {"complete": False, "finished": values["finished"][:2]}
            manifest.write_text(json.dumps(values))
        again = Command(words, world.root / "again.log")
        assert again.code() == 1
        assert said in again.printed().replace("\n", " ")
    assert Command([*words, "--restart"], world.root / "again.log").code() == 0
    result_of(output)


def test_a_folder_in_which_no_run_began_is_new(world: World, whole: dict[str, str]) -> None:
    output = fresh(world.root / "left")
    (output / "secateur").mkdir(parents=True)
    (output / "secateur" / "lock").write_text('{"pid": 1}')
    assert Command(world.commands["prune"](output), world.root / "left.log").code() == 0
    assert result_of(output) == whole


def test_a_page_that_is_missing_is_written_again(world: World) -> None:
    output = fresh(world.root / "page")
    words = world.commands["prune"](output)
    assert Command(words, world.root / "page.log").code() == 0
    (output / "secateur" / "report.html").unlink()
    assert Command(words, world.root / "page.log").code() == 0
    assert (output / "secateur" / "report.html").is_file()


def test_unreadable_text_takes_no_folder(world: World) -> None:
    output = fresh(world.root / "unread")
    text = world.root / "latin.txt"
    text.write_bytes("é ".encode("latin-1") * 2000)
    words = [*world.commands["prune"](output), "--calibration", text]
    command = Command(words, world.root / "unread.log")
    assert command.code() == 1 and "UTF-8" in command.printed()
    assert not output.exists()


def test_files_have_the_modes_of_the_umask(world: World) -> None:
    output = fresh(world.root / "modes")
    assert Command(world.commands["prune"](output), world.root / "modes.log").code() == 0
    modes = {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir() if path.is_file()}
    assert len(modes) == 1
    assert modes == {stat.S_IMODE((output / "config.json").stat().st_mode)}
