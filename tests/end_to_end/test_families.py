"""Every family: prune, save, load in a fresh process, same logits, exact pattern."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
from fresh import IDS, logits_of
from secateur.models.masks import masks_path, read_masks
from tiny import FAMILIES, make_tokenizer

PATTERNS = ("0.37", "2:4")
REFERENCES = {"0.37": "pruned", "2:4": "dense"}
REBUILDS = {"0.37": "barber", "2:4": "swaps"}


def recipe_for(text: Path, pattern: str) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "pattern": pattern,
            "stages": [
                {"method": "wanda"},
                {"method": REBUILDS[pattern]},
                {"method": "refit"},
                {
                    "method": "reconstruct",
                    "epochs": 1,
                    "reference": REFERENCES[pattern],
                    "vectors": pattern != "2:4",
                },
            ],
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            "dtype": "float32",
        }
    )


@pytest.fixture(scope="module")
def pruned(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """All families pruned to all patterns: ``family pattern`` -> folder."""
    folders = {}
    for family in FAMILIES:
        for pattern in PATTERNS:
            output = tmp_path_factory.mktemp("pruned") / "model"
            source = checkpoints(family, torch.bfloat16)
            secateur.prune(source, recipe_for(text_file, pattern), output)
            folders[f"{family} {pattern}"] = output
    return folders


@pytest.fixture(scope="module")
def fresh_logits(
    pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Logits of all of them, from a process that knows nothing of secateur."""
    return logits_of(pruned, tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_model_pruned_in_memory(
    family: str,
    pattern: str,
    fresh_logits: dict[str, Tensor],
    checkpoints: Callable[..., Path],
    text_file: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family, torch.bfloat16))
    result = secateur.prune(model, recipe_for(text_file, pattern), tokenizer=make_tokenizer())
    assert result.model is model
    with torch.no_grad():
        logits = model(IDS).logits.float()
    assert torch.equal(fresh_logits[f"{family} {pattern}"], logits)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_exact_pattern(family: str, pattern: str, pruned: dict[str, Path]) -> None:
    inspection = secateur.inspect(pruned[f"{family} {pattern}"])
    if pattern == "2:4":
        assert "2:4" in inspection.patterns
        assert inspection.zeros * 2 == inspection.weights
    else:
        assert inspection.zeros == round(0.37 * inspection.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_linears_is_left_as_it_was(
    family: str, pruned: dict[str, Path], checkpoints: Callable[..., Path]
) -> None:
    before = AutoModelForCausalLM.from_pretrained(checkpoints(family, torch.bfloat16))
    after = AutoModelForCausalLM.from_pretrained(pruned[f"{family} 2:4"])
    dense = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert parameter.dtype == dense[name].dtype
        if not bool((parameter == 0).sum() * 2 == parameter.numel()):
            assert torch.equal(parameter, dense[name]), name


def test_masks_on_disk_are_those_of_the_files(pruned: dict[str, Path]) -> None:
    output = pruned["llama 0.37"]
    weights = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for index in range(3):
        prefix = f"model.layers.{index}."
        columns = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor.shape[1]
            for name, tensor in weights.items()
            if name.startswith(prefix) and tensor.ndim == 2
        }
        masks = read_masks(masks_path(output, index), columns)
        assert set(masks) == set(columns)
        for name, mask_OI in masks.items():
            assert torch.equal(mask_OI, weights[f"{prefix}{name}.weight"] != 0)
