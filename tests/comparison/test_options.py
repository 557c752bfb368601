"""What is wrong with a comparison is found before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.comparison.check import Checked
from secateur.comparison.check import check as check_apart
from secateur.runs.errors import SecateurError

Write = Callable[..., Path]
Check = Callable[[Path], Checked]
STEPS = {"tokens": 128, "length": 32, "batch_tokens": 64}


@pytest.fixture
def write(checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path) -> Write:
    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(checkpoints("llama")),
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            "evaluation": {"text": str(text_file), "window": 32, "max_windows": 4},
            "rows": {
                "magnitude": {"stages": [{"method": "magnitude"}]},
                "wanda 2:4": {"stages": [{"method": "wanda"}], "pattern": "2:4"},
            },
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def check(tmp_path: Path) -> Check:
    (tmp_path / "scratch").mkdir()
    return lambda file: check_apart(file, tmp_path / "scratch")


def test_rows_are_complete_recipes_with_folders_of_their_own(write: Write, check: Check) -> None:
    checked = check(write())
    assert [row.name for row in checked.rows] == ["dense", "magnitude", "wanda 2:4"]
    assert checked.rows[0].recipe is None
    recipe = yaml.safe_load(checked.rows[2].recipe or "")
    assert recipe["pattern"] == "2:4"
    assert recipe["calibration"]["samples"] == 8
    folders = [row.folder for row in checked.rows]
    assert len(set(folders)) == 3
    assert folders[2].startswith("wanda-2-4-")


def test_what_decides_a_row_decides_its_folder(write: Write, check: Check, text_file: Path) -> None:
    before = check(write())
    rows = {
        "magnitude": {"stages": [{"method": "magnitude"}], "pattern": "0.6"},
        "wanda 2:4": {"stages": [{"method": "wanda"}], "pattern": "2:4"},
    }
    other_row = check(write(rows=rows))
    kept = [a == b for a, b in zip(before.rows, other_row.rows, strict=True)]
    assert kept == [True, False, True]
    assert other_row.evaluation == before.evaluation
    wider = {"text": str(text_file), "window": 64, "max_windows": 4}
    other_protocol = check(write(evaluation=wider))
    assert other_protocol.rows == before.rows
    assert other_protocol.evaluation != before.evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": {}}, "unknown key row; did you mean rows"),
        ({"evaluation": {"txt": "a.txt"}}, r"unknown key evaluation\.txt; did you mean text"),
        ({"evaluation": {}}, "either a text file or a dataset"),
        ({"evaluation": {"text": "a.txt", "dataset": "c4"}}, "either a text file or a dataset"),
        ({"rows": {}}, "rows is not valid"),
        ({"rows": {"dense": {}}}, "row dense is always there"),
        ({"rows": {"a": {"patern": 0.5}}}, "row a cannot run: .* did you mean pattern"),
        ({"rows": {"a": {"stages": [{"method": "refit"}]}}}, "row a cannot run: .*choose a mask"),
        ({"rows": {"a": {"calibration": {"samples": 4}}}}, "calibration of its own"),
        ({"rows": {"a": {"pattern": "1:5"}}}, "row a cannot run: "),
        ({"rows": {"a": {"command": "prun"}}}, r"rows\.a\.command is not valid"),
        ({"rows": {"a": {"from": "b"}, "b": {}}}, "row a cannot run: no row above it is named b"),
        ({"rows": {"a": {"from": "dense"}}}, "row a cannot run: no row above it is named dense"),
        ({"rows": {"a": {"command": "train"}}}, "row a cannot run: .*tokens"),
        ({"rows": {"a": {"command": "train", **STEPS}}}, "row a cannot run: .*needs text"),
        ({"rows": {"a": {"command": "recover"}}}, "row a cannot run: recover needs a model"),
        ({"rows": {"a": {"command": "shrink", "sparsity": 1e-6}}}, "row a .*than the smallest"),
        ({"rows": {"a": {"command": "shrink", "dtype": "auto"}}}, "dtype of its own"),
        ({"rows": {"a": {"script": ["nothing-here"]}}}, "row a cannot run: .*program nothing-here"),
        ({"rows": {"a": {"script": ["{python}", "gone.py"]}}}, r"there is no script gone\.py"),
        ({"rows": {"a": {"script": ["{python}", "{modle}"]}}}, r"place \{modle\} .*model, output"),
        ({"rows": {"a": {"script": ["true"], "stages": []}}}, "a script has no option stages"),
        ({"rows": {"a": {"script": ["true"], "pattern": "2:x"}}}, "row a cannot run: .*2:x"),
        ({"repeats": 0}, "repeats is not valid"),
        ({"yardstick": "wanda"}, "yardstick is to be wanda, and no row has that name"),
        ({"model": "nothing/here"}, "nothing/here"),
        ({"device": "tpu"}, "tpu is no device"),
        (
            {"calibration": {"source": "gone.txt", "length": 32}},
            r"row magnitude cannot run: There is no file",
        ),
    ],
)
def test_bad_input_is_found_first(
    write: Write, check: Check, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SecateurError, match=message):
        check(write(**changes))


def test_the_evaluation_is_checked_too(write: Write, check: Check, text_file: Path) -> None:
    for evaluation, message in [
        ({"text": "gone.txt", "window": 32}, "There is no file gone.txt"),
        ({"text": str(text_file), "window": 65}, "longer than the 64 positions"),
        ({"text": str(text_file), "window": 32, "tasks": ["piqua"]}, "did you mean piqa"),
    ]:
        with pytest.raises(SecateurError, match=message):
            check(write(evaluation=evaluation))


def test_what_a_row_starts_from_decides_its_folder(write: Write, check: Check) -> None:
    rows = {
        "a": {"stages": [{"method": "magnitude"}]},
        "b": {"stages": [{"method": "keep"}], "from": "a"},
        "c": {"stages": [{"method": "keep"}]},
        "d": {"command": "shrink", "sparsity": 0.3},
        "e": {"script": ["true", "{model}", "{output}"], "from": "d"},
    }
    before = {row.name: row for row in check(write(rows=rows)).rows}
    assert (before["b"].start, before["e"].start) == ("a", "d")
    assert before["e"].remote and not before["b"].remote
    assert len({row.folder.rpartition("-")[2] for row in before.values()}) == 6
    rows["a"]["pattern"] = "0.6"
    after = {row.name: row for row in check(write(rows=rows)).rows}
    changed = [name for name in before if before[name].folder != after[name].folder]
    assert changed == ["a", "b"]


def test_a_list_is_a_row_for_each(write: Write, check: Check) -> None:
    rows = {
        "wanda": {"stages": [{"method": "wanda"}], "pattern": [0.5, "2:4"]},
        "cut": {"command": "shrink", "sparsity": [0.2, 0.3]},
    }
    checked = check(write(rows=rows, yardstick="wanda")).rows
    assert [row.name for row in checked[1:]] == ["wanda, 0.5", "wanda, 2:4", "cut, 0.2", "cut, 0.3"]
    yardsticks = [row.yardstick for row in checked]
    assert yardsticks == [None, "wanda, 0.5", "wanda, 2:4", None, None]


def test_samples_of_rounds_are_their_own(write: Write, check: Check) -> None:
    rounds = {"command": "shrink", "preset": "paper", "masks": 60}
    rows = {"as it is": rounds, "short": {**rounds, "calibration": {"samples": 4}}}
    recipes = [yaml.safe_load(row.recipe or "") for row in check(write(rows=rows)).rows[1:]]
    assert [recipe["calibration"]["samples"] for recipe in recipes] == [32, 4]
    assert [recipe["calibration"]["length"] for recipe in recipes] == [32, 32]


@pytest.mark.parametrize("content", ["rows: [", "- a list", ""])
def test_no_mapping(check: Check, tmp_path: Path, content: str) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(content)
    with pytest.raises(SecateurError, match="not valid"):
        check(path)
    with pytest.raises(SecateurError, match="cannot be read"):
        check(tmp_path / "gone.yaml")
