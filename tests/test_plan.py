from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import secateur
from secateur.architecture import find_blocks
from secateur.checkpoint.skeleton import build_skeleton
from secateur.plan import uniform_plan
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_and_loaded_model_have_the_same_plan(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(family)
    pattern = secateur.parse_pattern("0.3")
    skeleton = uniform_plan(find_blocks(build_skeleton(folder)), pattern)
    loaded = uniform_plan(find_blocks(AutoModelForCausalLM.from_pretrained(folder)), pattern)
    assert skeleton == loaded


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0, 0.999))
def test_zeros_add_up_to_the_rounded_share(
    sparsity: float, checkpoints: Callable[..., Path]
) -> None:
    blocks = find_blocks(build_skeleton(checkpoints("llama")))
    plan = uniform_plan(blocks, secateur.Unstructured(sparsity))
    weights = sum(plan.weights.values())
    assert sum(plan.zeros.values()) == round(sparsity * weights)
    for name, zeros in plan.zeros.items():
        assert abs(zeros - sparsity * plan.weights[name]) <= 1
