"""Files damaged at random: a sentence, or a result that loads and equals what it came from."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from catalogue.commands import COMMANDS, problem_of, run, state_of
from secateur.pruning.prune import plan
from secateur.pruning.recipe import Recipe

FILES = (
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "plan.json",
    "recipe.yaml",
)
COUNT = int(os.environ.get("SOAK_MUTATIONS", "200"))
_BATCH = 20
# Weights are most of the file; what lies behind the header cannot be told from other weights.
_HEADER = 4096


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Flip, remove, repeat, cut or splice some bytes near the beginning."""
    at = draw.randrange(min(len(content), _HEADER))
    span = draw.choice((1, 1, 2, 8, 64))
    kind = draw.choice(("flip", "flip", "drop", "repeat", "cut", "digit", "splice"))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == "drop":
        return content[:at] + content[at + span :]
    if kind == "repeat":
        return content[:at] + content[at : at + span] * 2 + content[at + span :]
    if kind == "cut":
        return content[:at]
    if kind == "digit":
        return content[:at] + draw.choice((b"-", b"0", b"9", b"1e9", b"null")) + content[at + 1 :]
    other = draw.randrange(len(content))
    return content[:at] + content[other : other + span] + content[at + span :]


@pytest.mark.parametrize("batch", range(-(-COUNT // _BATCH)))
def test_damaged_files_are_refused_or_read_as_transformers_does(
    batch: int,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = tmp_path / "good"
    shutil.copytree(checkpoints("llama"), good / "model")
    shutil.copy(text_file, good / "text.txt")
    recipe = Recipe.from_mapping(
        {"stages": [{"method": "magnitude"}], "calibration": {"source": "text.txt", "length": 16}}
    )
    plan(good / "model", recipe).write(good / "plan.json")
    (good / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    for number in range(batch * _BATCH, min(COUNT, (batch + 1) * _BATCH)):
        draw = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        name = draw.choice(FILES)
        (folder / name).write_bytes(mutated((folder / name).read_bytes(), draw))
        monkeypatch.chdir(folder)
        words = COMMANDS["prune"] if number % 2 else COMMANDS["estimate"]
        words += {"plan.json": " --plan plan.json", "recipe.yaml": " --recipe recipe.yaml"}.get(
            name, ""
        )
        before = state_of(folder)
        ended = run(shlex.split(words), capsys)
        if ended.code == 0:
            if number % 2:
                require_equal(folder)
        else:
            problem = problem_of(ended.code, ended.out, ended.err)
            assert not problem, f"{number}, {name}: {problem}\n{ended.err[-600:]}"
            assert state_of(folder) == before, f"{number}, {name}: the refusal changed files"
        shutil.rmtree(folder)


def require_equal(folder: Path) -> None:
    """Kept weights are those that transformers reads of the model."""
    made, dense = (AutoModelForCausalLM.from_pretrained(folder / each) for each in ("out", "model"))
    zeros = total = 0
    for (name, pruned), weight in zip(made.named_parameters(), dense.parameters(), strict=True):
        kept = pruned != 0
        assert torch.equal(pruned[kept], weight[kept]), name
        zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    assert 0 < zeros < total
