"""What is wrong with a comparison is found before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.comparison.options import check
from secateur.runs.errors import SecateurError

Write = Callable[..., Path]


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


def test_rows_are_complete_recipes_with_folders_of_their_own(write: Write) -> None:
    checked = check(write())
    assert [row.name for row in checked.rows] == ["dense", "magnitude", "wanda 2:4"]
    assert checked.rows[0].recipe is None
    recipe = yaml.safe_load(checked.rows[2].recipe or "")
    assert recipe["pattern"] == "2:4"
    assert recipe["calibration"]["samples"] == 8
    folders = [row.folder for row in checked.rows]
    assert len(set(folders)) == 3
    assert folders[2].startswith("wanda-2-4-")


def test_what_decides_a_row_decides_its_folder(write: Write, text_file: Path) -> None:
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
        ({"model": "nothing/here"}, "nothing/here"),
        ({"device": "tpu"}, "tpu is no device"),
        (
            {"calibration": {"source": "gone.txt", "length": 32}},
            r"row magnitude cannot run: There is no file",
        ),
    ],
)
def test_bad_input_is_found_first(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        check(write(**changes))


def test_the_evaluation_is_checked_too(write: Write, text_file: Path) -> None:
    for evaluation, message in [
        ({"text": "gone.txt"}, "There is no file gone.txt"),
        ({"text": str(text_file), "window": 65}, "longer than the 64 positions"),
        ({"text": str(text_file), "window": 32, "tasks": ["piqua"]}, "did you mean piqa"),
    ]:
        with pytest.raises(SecateurError, match=message):
            check(write(evaluation=evaluation))


@pytest.mark.parametrize("content", ["rows: [", "- a list", ""])
def test_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(content)
    with pytest.raises(SecateurError, match="not valid"):
        check(path)
    with pytest.raises(SecateurError, match="cannot be read"):
        check(tmp_path / "gone.yaml")
