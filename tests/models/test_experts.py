from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.models.experts import unstacked_experts
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_unstacked_experts_compute_the_same_and_share_their_weights(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    ids = torch.arange(4, 36).unsqueeze(0)
    block = find_blocks(model)[1]
    with torch.no_grad():
        expected = model(ids).logits
        with unstacked_experts(block):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
            experts = [linear for linear in find_linears(block) if ".experts." in linear.name]
            assert len(experts) == 8
            for linear in experts:
                linear.weight_OI.zero_()
        assert not bool(block.mlp.experts.gate_up_proj.any())
        assert not bool(block.mlp.experts.down_proj.any())


def test_routers_are_left_alone(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2_moe"))
    names = {linear.name.rpartition(".")[2] for linear in find_linears(find_blocks(model)[0])}
    assert not names & {"gate", "router", "shared_expert_gate"}
