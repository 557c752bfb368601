"""What a trial says of memory is what the run itself takes."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.estimation import estimate as estimation
from secateur.estimation.shrinking import estimate_shrinking
from secateur.estimation.training import estimate_recovery, estimate_training
from secateur.estimation.trial import Trial
from secateur.methods import STAGES
from secateur.models.checkpoint import Checkpoint
from secateur.models.miniature import write_miniature
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.runs.allocations import peak_allocation
from secateur.runs.errors import SecateurError
from secateur.shrinking.options import ShrinkOptions
from secateur.training.options import Training
from secateur.training.recovery_options import Recovery
from tiny import make_checkpoint

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2400,
    "max_position_embeddings": 512,
}
# What has to stand around a stage for it to have its place in a recipe.
RECIPES: dict[str, list[dict[str, Any]]] = {
    name: [{"method": name}] for name, stage in STAGES.items() if stage.chooses_mask
} | {
    "permute": [{"method": "permute"}, {"method": "wanda"}],
    "scales": [
        {"method": "wanda"},
        {"method": "quantize", "group": 32},
        {"method": "scales"},
    ],
}
for _name in STAGES.keys() - RECIPES.keys():
    RECIPES[_name] = [{"method": "wanda"}, {"method": _name}]
RECIPES["quantize"][1]["group"] = 32
RECIPES["besa-reconstruct"] = [{"method": "besa-rates"}, {"method": "besa-reconstruct"}]


_PEAK = """
import json, sys
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.runs.allocations import peak_allocation
values = json.loads(sys.argv[1])
model = values.pop("model")
recipe = Recipe.from_mapping(values)
print(peak_allocation(lambda: prune(model, recipe, model + "-pruned")))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint("llama", folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices(string.ascii_letters, k=20_000)))
    return path


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"keep"}))
def test_a_trial_takes_its_share_of_the_memory_of_a_run(
    name: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_mapping(
        {
            "stages": RECIPES[name],
            "pattern": "2:4" if name == "permute" else "0.5",
            "calibration": {"source": str(text), "samples": 16, "length": 64},
            "batch_tokens": 256,
        }
    )
    counted: list[int] = []

    def count(source: Checkpoint, run: Any, **options: Any) -> int:
        miniature = write_miniature(source, tmp_path / "model", 4, 2)
        trial = Trial(miniature.folder, text, tmp_path / "small", 4)
        counted.append(16 * peak_allocation(lambda: run(trial)))
        return 0

    monkeypatch.setattr(estimation, "peak_of", count)
    estimation.estimate(model, recipe)
    real = peak_allocation(lambda: prune(model, recipe, tmp_path / "output"))
    assert 0.95 * real < counted[0] < 1.35 * real


def test_the_peak_is_at_least_what_a_process_takes_and_at_most_a_third_more(
    model: Path, text: Path, tmp_path: Path
) -> None:
    flags = ["--calibration", str(text), "--samples", "32", "--length", "128", "--json"]

    def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "secateur", *words, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    said = run("estimate", str(model))["peak_memory_bytes"]
    used = run("prune", str(model), "-o", str(tmp_path / "output"))["peak_memory_bytes"]
    assert used <= said <= 1.3 * used


def test_the_peak_of_prune_does_not_rise_with_depth(text: Path, tmp_path: Path) -> None:
    recipe = {
        "stages": [{"method": "wanda"}],
        "calibration": {"source": str(text), "samples": 8, "length": 64},
    }
    peaks = []
    for blocks in (4, 12):
        folder = tmp_path / str(blocks)
        make_checkpoint("llama", folder, **SIZES, num_hidden_layers=blocks)
        values = json.dumps(recipe | {"model": str(folder)})
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, values], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    block = Checkpoint.open(folder).blocks[0]
    assert peaks[1] - peaks[0] < 4 * sum(each.numel() for each in block.parameters())


def test_every_command_says_what_it_needs(model: Path, text: Path) -> None:
    calibration = {"source": str(text), "samples": 8, "length": 32}
    small = Training.from_mapping({"tokens": 1024, "length": 64, "batch_tokens": 256})
    large = Training.from_mapping(
        {"tokens": 8192, "length": 256, "batch_tokens": 4096, "start": "magnitude"}
    )
    kept = Training.from_mapping({"tokens": 1024, "length": 64, "batch_tokens": 256}, "keep-mask")
    options = ShrinkOptions.from_mapping({"calibration": calibration})
    recovery = Recovery.from_mapping({"tokens": 512, "length": 64, "batch_tokens": 256})
    rounds = ShrinkOptions.from_mapping({"calibration": calibration, "preset": "paper"})
    few = estimate_training(model, small).peak_memory_bytes
    assert estimate_training(model, large).peak_memory_bytes > few
    for needs in (
        estimate_training(model, kept),
        estimate_shrinking(model, options),
        estimate_shrinking(model, rounds),
        estimate_recovery(model, recovery, teacher=model),
    ):
        assert needs.peak_memory_bytes > 0


def test_a_model_that_writes_its_own_text_is_in_memory_as_a_whole(model: Path, text: Path) -> None:
    def of(source: str) -> int:
        calibration = {"source": source, "samples": 64, "length": 512}
        recipe = Recipe.from_mapping({"calibration": calibration, "batch_tokens": 512})
        return estimation.text_bytes(
            Checkpoint.open(model), recipe.calibration, recipe.dtype, recipe.device
        )

    keys_and_values = 2 * 2 * 3 * 2 * 64 * 512 * 80
    assert of(str(text)) == 0
    assert of("self") > keys_and_values


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe", "gpt2", "falcon"])
def test_a_miniature_has_the_proportions_of_its_model(family: str, tmp_path: Path) -> None:
    more = {"n_embd": 128} if family == "gpt2" else {}
    make_checkpoint(family, tmp_path / "model", hidden_size=128, **more)
    source = Checkpoint.open(tmp_path / "model")
    small = Checkpoint.open(write_miniature(source, tmp_path / "small", 2, 2).folder)
    assert len(small.blocks) == 2
    assert small.hidden_size == 64

    def weights(of: Checkpoint) -> int:
        return sum(parameter.numel() for parameter in of.blocks[0].parameters())

    assert weights(small) == pytest.approx(weights(source) / 4, rel=0.1)


def test_a_refusal_of_the_run_is_one_of_the_estimate(model: Path, text: Path) -> None:
    values = {
        "stages": [{"method": "wanda"}, {"method": "quantize", "group": 100}],
        "calibration": {"source": str(text), "samples": 8, "length": 32},
    }
    with pytest.raises(SecateurError, match="100 columns"):
        estimation.estimate(model, Recipe.from_mapping(values))
