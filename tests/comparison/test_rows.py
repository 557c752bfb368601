"""A row is any command, a script, or what starts from another row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from children import is_gone, noted, until
from secateur.comparison import ComparisonResult, compare
from secateur.comparison.table import comparison_markdown
from secateur.runs.errors import SecateurError
from secateur.runs.lock import locked
from secateur.runs.processes import Measured

Edit = Callable[..., Path]
MAGNITUDE = {"stages": [{"method": "magnitude"}], "pattern": "2:4"}
STEPS = {
    "tokens": 128,
    "length": 32,
    "batch_tokens": 64,
    "validation_windows": 2,
}
# Prunes a checkpoint by magnitude.
PEER = """
import argparse, shutil
import numpy
from safetensors.numpy import load_file, save_file

parser = argparse.ArgumentParser()
for name in ("model", "--output", "--tokens", "--share"):
    parser.add_argument(name)
given = parser.parse_args()
shutil.copytree(given.model, given.output)
shutil.copy(given.tokens, given.output + "/seen.tokens")
file = given.output + "/model.safetensors"
tensors = load_file(file)
for name, tensor in tensors.items():
    if "layers" in name and tensor.ndim == 2:
        smallest = numpy.abs(tensor).ravel().argsort()[: round(float(given.share) * tensor.size)]
        tensor.ravel()[smallest] = 0
save_file(tensors, file, {"format": "pt"})
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    path = tmp_path / "peers" / "peer.py"
    path.parent.mkdir()
    path.write_text(PEER)
    return path


def script(share: str = "0.5") -> list[str | float]:
    words = ["{python}", "{folder}/peers/peer.py", "{model}", "--output", "{output}"]
    return [*words, "--tokens", "{tokens}", "--share", share]


def test_commands_start_from_each_other(
    edit: Edit, ran: list[str], text_file: Path, tmp_path: Path
) -> None:
    cut = {"command": "shrink", "sparsity": 0.3, "sub_models": 8}
    fitted = {"epochs": 1, "batch_sequences": 4}
    rows = {
        "pruned": MAGNITUDE,
        "trained": {
            **{"command": "train", "from": "pruned", "preset": "keep-mask"},
            **{"data": str(text_file), **STEPS},
        },
        "cut": cut,
        "recovered": {
            **{"command": "recover", "from": "cut", "data": [str(text_file)]},
            **{**STEPS, "blocks": fitted, "block_windows": 4, "rank": 4},
        },
    }
    result = compare(edit(rows), tmp_path / "out")
    _, pruned, trained, small, recovered = result.rows
    assert [row.command for row in result.rows] == [None, "prune", "train", "shrink", "recover"]
    assert (trained.start, recovered.start) == ("pruned", "cut")
    assert trained.pruned is not None and pruned.pruned is not None
    assert trained.pruned.sparsity == pruned.pruned.sparsity == 0.5
    assert trained.evaluation["model"]["loss"] != pruned.evaluation["model"]["loss"]
    assert small.pruned is not None and recovered.pruned is not None
    assert result.weights is not None and small.pruned.weights is not None
    assert small.pruned.weights == recovered.pruned.weights < result.weights
    assert small.size_bytes < pruned.size_bytes
    report = json.loads((tmp_path / "out" / recovered.folder / "report.json").read_text())
    assert report["validation"]["before"] > 0
    assert "| weights |" in comparison_markdown(result)
    assert not list((tmp_path / "out").rglob("model*.safetensors"))
    # Nothing that is finished is made again for a row that is new.
    ran.clear()
    rows["again"] = {**rows["trained"], "seed": 1}
    compare(edit(rows), tmp_path / "out")
    assert [command.split()[0] for command in ran] == ["prune", "train", "eval"]


def test_a_checkpoint_stays_until_nothing_starts_from_it(
    edit: Edit, ran: list[str], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.comparison import run as module

    measure = module.measure

    def stop(command: Sequence[str], log: Path) -> Measured:
        if "train" in command:
            raise KeyboardInterrupt
        return measure(command, log)

    tuned = {"command": "train", "from": "pruned", "preset": "keep-mask", **STEPS}
    file = edit({"pruned": MAGNITUDE, "trained": {**tuned, "data": str(text_file)}})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "measure", stop)
        compare(file, tmp_path / "out")
    ran.clear()
    result = compare(file, tmp_path / "out")
    assert [command.split()[0] for command in ran] == ["train", "eval"]
    assert len(result.rows) == 3


def test_a_script_is_a_row_like_any_other(
    edit: Edit, ran: list[str], peer: Path, tmp_path: Path
) -> None:
    rows = {
        "peer": {"script": script("{pattern}"), "pattern": [0.25, 0.5]},
        "ours": {**MAGNITUDE, "pattern": ["0.5"]},
    }
    result = compare(edit(rows, top={"yardstick": "peer"}), tmp_path / "out", keep=True)
    assert [row.name for row in result.rows[1:]] == ["peer, 0.25", "peer, 0.5", "ours, 0.5"]
    costs = [row.pruned for row in result.rows[1:]]
    assert [cost and round(cost.sparsity or 0, 3) for cost in costs] == [0.25, 0.5, 0.5]
    assert result.rows[3].yardstick == "peer, 0.5"
    assert result.rows[1].recipe is None and "{folder}" in str(result.rows[1].command)
    assert result.rows[2].evaluation["divergence"]["kl"] > 0
    assert "| time / peer |" in comparison_markdown(result)
    # Both calibrate on the same windows.
    seen, drawn = (
        load_file(tmp_path / "out" / row.folder / "pruned" / name)[key]
        for row, name, key in (
            (result.rows[1], "seen.tokens", "input_ids"),
            (result.rows[3], "secateur/calibration.safetensors", "tokens"),
        )
    )
    assert (seen == drawn).all()
    ran.clear()
    compare(edit(rows), tmp_path / "out", keep=True)
    assert ran == []
    peer.write_text(PEER + "# changed\n")
    compare(edit(rows), tmp_path / "out")
    assert [command.split()[0] for command in ran] == ["script", "eval"] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"script": script("0.25"), "pattern": 0.5}, r"have 0\.25\d\d zeros, and not .* 0\.5"),
        ({"script": ["{python}", "-c", "pass", "--output", "{output}"]}, "left no checkpoint"),
        ({"script": ["{python}", "-c", "1/0", "--output", "{output}"]}, "ZeroDivisionError"),
    ],
)
def test_a_script_that_misses_is_no_row(
    edit: Edit, ran: list[str], peer: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(SecateurError, match=message):
        compare(edit({"peer": row}), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["dense"]


def test_what_starts_from_a_failed_row_fails_too(
    edit: Edit, ran: list[str], peer: Path, tmp_path: Path
) -> None:
    broken = {"script": ["{python}", "-c", "1/0", "--output", "{output}"]}
    rows = {"broken": broken, "next": {**MAGNITUDE, "from": "broken"}, "good": MAGNITUDE}
    with pytest.raises(SecateurError, match="The row next failed: broken, which it starts from"):
        compare(edit(rows), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["dense", "good"]


def test_repeats_take_turns(
    edit: Edit, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.comparison import run as module

    measure, seconds = module.measure, iter((4.0, 10.0, 2.0, 30.0, 3.0))

    def take(command: Sequence[str], log: Path) -> Measured:
        measure(command, log)
        return Measured(seconds=next(seconds), cpu_seconds=1.0, peak_bytes=10**9)

    monkeypatch.setattr(module, "measure", take)
    rows = {"a": {**MAGNITUDE, "repeats": 3}, "b": MAGNITUDE}
    result = compare(edit(rows, top={"repeats": 2, "yardstick": "b"}), tmp_path / "out")
    made = [command.split()[0] + command.split()[1][0] for command in ran if "dense" not in command]
    assert [each for each in made if "eval" not in each] == ["prunea", "pruneb", *made[-3:]]
    a, b = (row.pruned for row in result.rows[1:])
    assert a is not None and b is not None
    assert [run.seconds for run in a.runs] == [4.0, 2.0, 3.0]
    assert (a.seconds.minimum, a.seconds.median, a.seconds.maximum) == (2.0, 3.0, 4.0)
    assert "| 3.0 s (2.0 s to 4.0 s) | 0.20 |" in comparison_markdown(result)
    # One more run does only that.
    ran.clear()
    seconds = iter((1.0,))
    rows["b"]["repeats"] = 3
    compare(edit(rows, top={"repeats": 2, "yardstick": "b"}), tmp_path / "out")
    assert [command.split()[0] for command in ran] == ["prune"]


def test_two_comparisons_do_not_share_a_folder(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out" / "rows"),
        pytest.raises(SecateurError, match="out is in use by process"),
    ):
        compare(edit(), tmp_path / "out")
    assert ran == []


def test_the_first_schema_is_still_read(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    result = compare(edit(), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    values["schema_version"] = 1
    for row in values["rows"][1:]:
        cost = row["pruned"].pop("runs")[0]
        row["pruned"] = {**row["pruned"], **cost}
    before = ComparisonResult.model_validate(values)
    assert before.rows == result.rows


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
def test_a_killed_comparison_leaves_no_process_and_goes_on_to_measure_others(
    edit: Edit, tmp_path: Path
) -> None:
    started, copying = tmp_path / "started", tmp_path / "copying"
    waiting = f"""
import os, pathlib, shutil, sys, time
pathlib.Path({str(started)!r}).write_text(f"{{os.getpid()}}.")
while not pathlib.Path({str(copying)!r}).exists():
    time.sleep(0.1)
shutil.copytree(sys.argv[1], sys.argv[2])
"""
    peer = {"script": ["{python}", "-c", waiting, "{model}", "{output}"]}
    rows = {"peer": peer, "magnitude": MAGNITUDE}
    file, output = edit(rows), tmp_path / "out"
    command = [sys.executable, "-m", "secateur", "compare", str(file), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: noted(started))
    process.kill()
    process.wait()
    until(lambda: is_gone(started))
    copying.touch()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "magnitude" in done.stdout
    saved = ComparisonResult.model_validate_json((output / "comparison.json").read_text())
    assert [row.name for row in saved.rows] == ["dense", "peer", "magnitude"]
    cost = saved.rows[2].pruned
    assert cost is not None
    assert cost.cpu_seconds.minimum > 0
    assert cost.peak_bytes > 10**8
