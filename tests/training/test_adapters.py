"""Adapters begin as nothing, and merging them changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError
from secateur.training import adapters
from secateur.training.adapters import Adapted, check_peft, count_parameters
from secateur.training.options import Training

IDS = torch.arange(4, 36).unsqueeze(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_merged_model_computes_what_the_adapted_one_did(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype=torch.float64).eval()
    names, before = set(model.state_dict()), model(IDS).logits
    blocks = find_blocks(model)
    added = Adapted(blocks, rank=2, seed=0)
    trained = added.train(Training(tokens=10**6))
    assert torch.equal(model(IDS).logits, before)
    for parameter in trained.values():
        parameter.normal_(0, 0.1)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, before)
    counted = sum(parameter.numel() for parameter in trained.values())
    added.merge()
    assert set(model.state_dict()) == names
    assert counted == count_parameters(find_blocks(model), 2)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-6, atol=1e-6)


def test_seed_decides_how_adapters_begin(checkpoints: Callable[..., Path]) -> None:
    def first(seed: int) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
        added = Adapted(find_blocks(model), 2, seed)
        return next(iter(added.train(Training(tokens=10**6)).values())).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda _name: None)
    with pytest.raises(SecateurError, match=r"secateur\[recover\]"):
        check_peft()
