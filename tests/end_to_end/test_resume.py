"""A run killed at any moment and started again ends with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from interruption import interrupted_after
from secateur.runs.errors import SecateurError
from tiny import make_tokenizer

# Runs the real program and kills it, by the signal nothing can catch, at a named moment.
_KILLED = """
import os, signal, sys
import safetensors.torch as writer
import secateur
from secateur.runs.run import Run
from secateur.models.streamed import StreamedStore
from secateur.pruning.walk import BlockPruner

moment, source, output, recipe = sys.argv[1:]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)

def after(owner, name, count):
    real, calls = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            die()
        return result
    setattr(owner, name, wrapped)

if moment == "inside a block":
    after(BlockPruner, "prune", 2)
elif moment == "between shard and manifest":
    after(StreamedStore, "save", 2)
elif moment == "between blocks":
    after(Run, "record", 2)
elif moment == "while a shard is written":
    real = writer.save_file
    def torn(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        if "model-00002" in path.name:
            path.write_bytes(path.read_bytes()[:100])
            die()
    writer.save_file = torn
elif moment == "before the end":
    after(StreamedStore, "finish", 1)
secateur.prune(source, secateur.Recipe.from_file(__import__("pathlib").Path(recipe)), output)
"""

# How many blocks are finished at each moment.
MOMENTS = {
    "inside a block": 1,
    "between shard and manifest": 1,
    "between blocks": 2,
    "while a shard is written": 1,
    "before the end": 3,
}


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "stages": [
                {"method": "sparsegpt"},
                {"method": "reconstruct", "epochs": 1, "reference": "dense"},
                {"method": "refit"},
            ],
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        }
    )


@pytest.fixture(scope="module")
def uninterrupted(
    checkpoints: Callable[..., Path],
    recipe: secateur.Recipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    secateur.prune(checkpoints("llama"), recipe, output)
    return output


def weights_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name.endswith(".index.json")
    }


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_to_the_same_bytes(
    moment: str,
    checkpoints: Callable[..., Path],
    recipe: secateur.Recipe,
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    source, output = checkpoints("llama"), tmp_path / "out"
    before = weights_in(source)
    arguments = [moment, source, output, tmp_path / "recipe.yaml"]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, arguments)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if moment != "before the end":
        assert not (output / "model.safetensors.index.json").exists()

    result = secateur.prune(source, recipe, output)
    assert weights_in(output) == weights_in(uninterrupted)
    assert weights_in(source) == before
    assert result.report.resumed_blocks == MOMENTS[moment]
    assert not list(output.rglob("*.part"))


def test_finished_run_is_returned_as_it_is(
    checkpoints: Callable[..., Path], recipe: secateur.Recipe, uninterrupted: Path
) -> None:
    before = weights_in(uninterrupted)
    again = secateur.prune(checkpoints("llama"), recipe, uninterrupted)
    assert again.report.model_dump(mode="json") == json.loads(
        (uninterrupted / "report.json").read_text()
    )
    assert weights_in(uninterrupted) == before


def test_changed_recipe_is_refused_unless_restarted(
    checkpoints: Callable[..., Path], recipe: secateur.Recipe, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    secateur.prune(checkpoints("llama"), recipe, output)
    other = recipe.model_copy(update={"pattern": secateur.parse_pattern("2:4")})
    with pytest.raises(SecateurError, match="begun with another recipe pattern"):
        secateur.prune(checkpoints("llama"), other, output)
    result = secateur.prune(checkpoints("llama"), other, output, restart=True)
    assert result.report.resumed_blocks == 0
    assert "2:4" in secateur.inspect(output).patterns


def test_other_model_is_refused(
    checkpoints: Callable[..., Path], recipe: secateur.Recipe, tmp_path: Path
) -> None:
    secateur.prune(checkpoints("llama"), recipe, tmp_path / "out")
    with pytest.raises(SecateurError, match="begun with another model"):
        secateur.prune(checkpoints("mistral"), recipe, tmp_path / "out")


def test_experts_resume_to_the_same_bytes(
    checkpoints: Callable[..., Path],
    recipe: secateur.Recipe,
    tmp_path: Path,
) -> None:
    source = checkpoints("mixtral")
    secateur.prune(source, recipe, tmp_path / "whole")

    with interrupted_after(blocks=2):
        secateur.prune(source, recipe, tmp_path / "out")
    result = secateur.prune(source, recipe, tmp_path / "out")
    assert result.report.resumed_blocks == 2
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "whole")


def test_model_in_memory_returns_its_masks_with_and_without_output(
    checkpoints: Callable[..., Path], recipe: secateur.Recipe, tmp_path: Path
) -> None:
    for output in (None, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
        result = secateur.prune(model, recipe, output, tokenizer=make_tokenizer())
        assert len(result.masks) == 3 * 7
        for name, mask_OI in result.masks.items():
            assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask_OI)
