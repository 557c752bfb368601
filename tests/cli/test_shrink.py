"""``secateur shrink`` as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.runs.errors import SecateurError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def flags(text_file: Path) -> list[str]:
    return [
        "--calibration", str(text_file), "--samples", "4", "--length", "16",
    ]  # fmt: skip


def test_shrink_prints_the_report_it_writes(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    chosen = ["--sparsity", "0.3", "--preset", "paper", "--seed", "3", "--prior", "fluctuation"]
    chosen += ["--masks", "4", "--step", "0.3"]
    printed = json.loads(
        run("shrink", str(checkpoints("llama")), "-o", str(output), *chosen, *flags(text_file),
            "--json")
    )  # fmt: skip
    assert printed == json.loads((output / "report.json").read_text())
    assert printed["options"]["calibration"]["seed"] == 3
    assert printed["options"]["prior"] == "fluctuation"
    assert printed["parameters"]["removed"] == pytest.approx(0.3, abs=0.01)


def test_flags_override_a_file_of_options(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("sparsity: 0.2\nform: uniform\ncalibration: {seed: 3, samples: 8}\n")
    words = ["shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--json"]
    words += ["--options", str(file), "--sparsity", "0.3", *flags(text_file)]
    options = json.loads(run(*words))["options"]
    assert (options["sparsity"], options["form"]) == (0.3, "uniform")
    assert (options["calibration"]["seed"], options["calibration"]["samples"]) == (3, 4)


def test_table_shows_what_is_left_of_each_block(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    printed = run(
        "shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--uniform",
        "--ffn-only", "--sparsity", "0.3", *flags(text_file),
    )  # fmt: skip
    rows = [line.split() for line in printed.splitlines()[1:4]]
    assert rows == [[str(block), "all", "32", "of", "64"] for block in range(3)]
    assert "removed" in printed


@pytest.mark.parametrize(("more", "left"), [([], "2 × 1"), (["--whole-groups"], "1 × 2")])
def test_table_shows_groups_by_query_heads(
    more: list[str],
    left: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    printed = run(
        "shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--uniform",
        "--sparsity", "0.3", *more, *flags(text_file),
    )  # fmt: skip
    assert printed.count(f"{left} of 2 × 2") == 3


def test_forms_exclude_each_other(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="not both"):
        run("shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--uniform",
            "--padded")  # fmt: skip


def test_unknown_prior_is_wrong_usage(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    chosen = ["--preset", "paper", "--prior", "wandb"]
    result = CliRunner().invoke(
        app, ["shrink", str(checkpoints("llama")), "-o", str(output), *chosen]
    )
    assert result.exit_code == 2
    assert "'wandb' is not one of 'wanda', 'magnitude'" in result.stderr
    assert not output.exists()


def test_curve_shows_sizes_and_cuts_nothing(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    chosen = ["--curve", "--sub-models", "12", "--grid", "16"]
    printed = run(
        "shrink", str(checkpoints("llama")), "-o", str(output), *chosen, *flags(text_file)
    )
    assert "expected KL" in printed
    assert sorted(path.name for path in output.iterdir()) == [
        "curve.json", "curve.svg", "secateur",
    ]  # fmt: skip
    curve = json.loads((output / "curve.json").read_text())
    assert {width % 16 for point in curve["points"] for width in point["widths"].values()} <= {
        0, 1, 2,
    }  # fmt: skip


def test_a_curve_has_no_target(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="not both"):
        run("shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--curve",
            "--sparsity", "0.3")  # fmt: skip


def test_the_curve_is_printed_as_json(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    printed = run(
        "shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--curve", "--json",
        "--sub-models", "12", *flags(text_file),
    )  # fmt: skip
    assert json.loads(printed) == json.loads((tmp_path / "out" / "curve.json").read_text())
