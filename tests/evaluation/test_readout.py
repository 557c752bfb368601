from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.evaluation.readout import find_readout
from secateur.evaluation.scores import score_windows
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_projection_give_the_models_own_loss(
    checkpoints: Callable[..., Path], family: str, tokens_N: Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    tokens_WL = tokens_N[:96].view(3, 32)
    with torch.no_grad():
        log_p = model(tokens_WL).logits[:, :-1].double().log_softmax(-1)
    expected = -log_p.gather(2, tokens_WL[:, 1:, None]).squeeze(2).mean(1)
    actual = score_windows(model, tokens_WL, dtype=torch.float32).loss_W
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "separable"), [("llama", True), ("opt", True), ("gemma2", False)]
)
def test_models_that_change_what_the_head_returns_are_taken_whole(
    checkpoints: Callable[..., Path], family: str, separable: bool, tokens_N: Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    readout = find_readout(model, tokens_N[None])
    assert readout.separable is separable
    logits = readout.project(readout.states(tokens_N[None, :32]))
    torch.testing.assert_close(logits, model(tokens_N[None, :32]).logits)
