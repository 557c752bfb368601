from __future__ import annotations

import pytest
import torch

from families import build
from secateur.models.experts import linear_shapes, stored_weights, unstacked_experts
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks

# A family of each layout: linears of one expert, and a linear that is a router.
LAYOUTS = {
    "mixtral": ("gate_up_proj", "down_proj"),
    "qwen2_moe": ("gate_up_proj", "down_proj"),
    "lfm2_moe": ("gate_up_proj", "down_proj"),
    "gpt_oss": ("gate_up_proj", "down_proj"),
    "aria_text": ("gate_up_proj", "down_proj"),
    "llama4_text": ("gate_up_proj", "down_proj"),
    "nemotron_h": ("up_proj", "down_proj"),
    "dbrx": ("w1", "v1", "w2"),
    "jetmoe": (),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_unstacked_experts_compute_the_same_and_share_their_weights(family: str) -> None:
    model = build(family).eval()
    blocks = find_blocks(model)
    # Grouped kernels know no float64.
    model.set_experts_implementation("eager")
    model.double()
    tokens = torch.arange(4, 36).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        with unstacked_experts(model):
            # A router may compute in fp32 whatever the model's dtype is.
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-6, atol=1e-7)
            experts = [
                linear
                for block in blocks
                for linear in find_linears(block)
                if "experts." in linear.name and "shared" not in linear.name
            ]
            assert experts
            for linear in experts:
                own = linear.name.rpartition(".")[2]
                assert own in LAYOUTS[family] or own.isdigit()
                linear.weight_OI.fill_(0.5)
        assert not torch.allclose(model(tokens).logits, expected)
    for block in blocks:
        plain = {f"{linear.name}.weight" for linear in find_linears(block)}
        for name in stored_weights(block).keys() - plain:
            assert bool((block.get_parameter(name) == 0.5).all())


@pytest.mark.parametrize("family", LAYOUTS)
def test_linears_see_stored_weights_as_they_lie(family: str) -> None:
    blocks = find_blocks(build(family))
    shapes = linear_shapes(blocks)
    stored = [
        layout(block.get_parameter(name))
        for block in blocks
        for name, layout in stored_weights(block).items()
    ]
    assert sum(each.numel() for each in stored) == sum(o * i for o, i in shapes.values())
    assert {tuple(each.shape[-2:]) for each in stored} >= set(shapes.values()) or family == "dbrx"


@pytest.mark.parametrize("family", LAYOUTS)
def test_routers_are_left_alone(family: str) -> None:
    model = build(family)
    with unstacked_experts(model):
        names = {name for block in find_blocks(model) for name in _names(block)}
    assert not {part for name in names for part in name.split(".")} & {"gate", "router"}


def _names(block: torch.nn.Module) -> list[str]:
    return [linear.name for linear in find_linears(block)]
