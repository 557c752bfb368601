from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import auto_class, build, tiny_config
from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError


def skeleton(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model on the meta device; changes are of its text configuration."""
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(family).from_config(config)
    return model


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("gemma3", "model.language_model.layers"),
        ("qwen2_5_vl", "model.language_model.layers"),
        ("llava", "model.language_model.layers"),
        ("opt", "model.decoder.layers"),
        ("mamba", "backbone.layers"),
    ],
)
def test_blocks_are_those_that_text_passes_through(family: str, prefix: str) -> None:
    assert find_blocks(skeleton(family)).prefix == prefix


def test_a_vision_tower_is_no_stack_of_blocks_whatever_its_size() -> None:
    config = tiny_config("gemma3")
    config.vision_config.num_hidden_layers = 16
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    assert find_blocks(model).prefix == "model.language_model.layers"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("hrm_text", {}, "more than one stack of HrmTextForCausalLM, model.L_module.layers"),
        ("zamba2", {}, "are one and the same linear"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "that depend on the text"),
        ("deepseek_v4", {}, r"hidden states of shape \[2, 6, 4, 32\]"),
        ("rwkv", {}, "its code changes weights while it runs"),
        ("blip", {}, "Text alone does not pass through"),
        ("xlnet", {}, r"hidden states of shape \[6, 2, 32\]"),
    ],
)
def test_other_structures_are_refused_in_a_sentence(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SecateurError, match=reason):
        find_blocks(skeleton(family, **changes))


@pytest.mark.parametrize("family", ["gpt_oss", "jamba"])
def test_a_model_in_memory_is_left_as_it_was(family: str) -> None:
    model = build(family).train()
    before = {name: (id(each), each.clone()) for name, each in model.named_parameters()}
    state = torch.random.get_rng_state()
    find_blocks(model)
    after = dict(model.named_parameters())
    assert {name: id(each) for name, each in after.items()} == {
        name: identity for name, (identity, _) in before.items()
    }
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
