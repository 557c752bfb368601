"""Bare Wanda under n:m takes the statistics of a block while it is dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.models.structure import find_linears
from secateur.patterns.pattern import Budget, parse_pattern, select
from secateur.pruning.recipe import Recipe
from secateur.solvers.scores import wanda_score
from secateur.text.calibration import load_calibration


@pytest.mark.parametrize(
    ("pattern", "stages", "dense"),
    [("2:4", ["wanda"], True), ("2:4", ["wanda", "barber"], False), ("0.5", ["wanda"], False)],
)
def test_bare_wanda_scores_by_the_dense_block(
    pattern: str,
    stages: list[str],
    dense: bool,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = checkpoints("llama")
    recipe = Recipe.from_mapping(
        {
            "pattern": pattern,
            "stages": [
                {"method": name, **({"ratio": 0} if name == "barber" else {})} for name in stages
            ],
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            "dtype": "float32",
            "device": "cpu",
        }
    )
    secateur.prune(folder, recipe, tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").model.layers[0]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = load_calibration(recipe.calibration, AutoTokenizer.from_pretrained(folder)).tokens
    inputs: dict[str, Tensor] = {}
    for linear in find_linears(model.model.layers[0]):

        def keep(_module: object, args: tuple[Tensor, ...], name: str = linear.name) -> None:
            inputs[name] = args[0].detach().flatten(0, 1)

        linear.module.register_forward_pre_hook(keep)
    model(tokens[: recipe.fitted_windows])

    equal = {}
    for linear in find_linears(model.model.layers[0]):
        w_OI = linear.weight_OI
        score_OI = wanda_score(w_OI, inputs[linear.name].square().mean(0))
        budget = Budget(parse_pattern(pattern), (len(w_OI),), (w_OI.numel() // 2,))
        kept_OI = pruned.get_submodule(linear.name).weight != 0
        equal[linear.name] = torch.equal(select(score_OI, budget), kept_OI)
    # The first group has the dense block's inputs in either order.
    assert equal["self_attn.q_proj"]
    assert all(equal.values()) == dense
