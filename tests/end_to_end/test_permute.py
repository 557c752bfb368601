"""Permuted before pruning: the same function, exact groups, files that load anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
from fresh import IDS, logits_of
from interruption import interrupted_after
from secateur.runs.errors import SecateurError
from tiny import make_tokenizer

# Separate and fused projections, Conv1D, biases, shared values, experts in one stack.
FAMILIES = ("llama", "qwen2", "phi3", "gpt2", "opt", "bloom", "mixtral")


def recipe_for(
    text: Path, *stages: str, pattern: str = "2:4", dtype: str = "float32"
) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "pattern": pattern,
            "stages": [{"method": stage} for stage in stages],
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            "dtype": dtype,
        }
    )


@pytest.fixture(scope="module")
def outputs(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp("permuted") / "model"
        secateur.prune(
            checkpoints(family, torch.bfloat16),
            recipe_for(text_file, "permute", "wanda"),
            folders[family],
        )
    return folders


@pytest.fixture(scope="module")
def fresh_logits(
    outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Logits of all of them, from a process that knows nothing of secateur."""
    return logits_of(outputs, tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_is_the_one_pruned_in_memory(
    family: str,
    outputs: dict[str, Path],
    fresh_logits: dict[str, Tensor],
    checkpoints: Callable[..., Path],
    text_file: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family, torch.bfloat16))
    recipe = recipe_for(text_file, "permute", "wanda")
    secateur.prune(model, recipe, tokenizer=make_tokenizer())
    with torch.no_grad():
        assert torch.equal(fresh_logits[family], model(IDS).logits.float())
    inspection = secateur.inspect(outputs[family])
    assert inspection.zeros * 2 == inspection.weights
    assert "2:4" in inspection.patterns


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_says_what_was_permuted_and_what_it_gained(
    family: str, outputs: dict[str, Path]
) -> None:
    report = json.loads((outputs[family] / "report.json").read_text())
    for block in report["blocks"]:
        assert block["notes"][0].startswith("permute: ")
        found = re.findall(r"keeps (\S+) of its score instead of ([0-9.]+)", block["notes"][0])
        # An expert that no token reaches is left as it is.
        assert len(found) == 2 or (family == "mixtral" and 2 < len(found) <= 1 + 4)
        assert all(0.5 < float(before) <= float(after) <= 1 for after, before in found)


def with_competing_channels(source: Path, folder: Path) -> Path:
    """The model with every other run of four hidden channels made much louder."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "up_proj" in name:
            tensor.view(-1, 8, tensor.shape[1])[:, :4] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "stages",
    [["wanda"], ["wanda", "refit"], ["sparsegpt", "reconstruct"], ["admm"]],
    ids="+".join,
)
def test_channels_that_compete_lose_less(
    stages: list[str], checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = with_competing_channels(checkpoints("llama"), tmp_path / "model")
    plain = secateur.prune(source, recipe_for(text_file, *stages), tmp_path / "plain")
    permuted = secateur.prune(
        source, recipe_for(text_file, "permute", *stages), tmp_path / "permuted"
    )
    for before, after in zip(plain.report.blocks, permuted.report.blocks, strict=True):
        new, old = (block.linears["mlp.down_proj"].relative_error for block in (after, before))
        assert new is not None
        assert old is not None
        assert new < 0.8 * old


def test_a_resumed_run_ends_with_the_same_bytes(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = checkpoints("qwen2")
    # Forward passes in bf16 would hide what the proof is to see: it runs in fp32 all the same.
    recipe = recipe_for(text_file, "permute", "wanda", "reconstruct", dtype="bfloat16")
    secateur.prune(source, recipe, tmp_path / "whole")

    with interrupted_after(blocks=1):
        secateur.prune(source, recipe, tmp_path / "out")
    report = secateur.prune(source, recipe, tmp_path / "out").report
    assert report.resumed_blocks == 1
    assert report.blocks[0].notes[0].count("keeps") == 2
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        again = tmp_path / "out" / path.relative_to(tmp_path / "whole")
        assert again.read_bytes() == path.read_bytes()


def test_heads_that_groups_straddle_are_left_alone(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(text_file, "permute", "wanda", pattern="8:16")
    result = secateur.prune(checkpoints("llama"), recipe, tmp_path / "out")
    note = result.report.blocks[0].notes[0]
    assert "self_attn.o_proj left alone, 16 does not divide the 8 channels of a head" in note
    assert "mlp.down_proj with the rows of mlp.gate_proj, mlp.up_proj keeps" in note


@pytest.mark.parametrize(
    ("pattern", "stages", "message"),
    [
        ("0.5", ["permute", "wanda"], r"the pattern 0\.5 has none; leave it out, or choose n:m"),
        ("2:4", ["wanda", "permute"], "permute changes the dense model and must come first"),
        ("2:4", ["permute", "permute", "wanda"], "must come first"),
        ("2:4", ["permute"], "first stage must choose a mask .*but there is none"),
        ("2:4", ["permute", "refit"], "first stage must choose a mask .*not refit"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    pattern: str, stages: list[str], message: str, text_file: Path
) -> None:
    with pytest.raises(SecateurError, match=message):
        recipe_for(text_file, *stages, pattern=pattern)
