from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.evaluation.predictions import Predictions, find_readout, kl_divergence
from secateur.evaluation.scores import Comparison, score_windows
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


def compare(model: PreTrainedModel, dense: PreTrainedModel, tokens_WL: Tensor) -> Comparison:
    comparison = score_windows(model, tokens_WL, dense=dense, dtype=torch.float32).comparison
    assert comparison is not None
    return comparison


def test_distances_are_those_of_brute_force(
    pruned: PreTrainedModel, dense: PreTrainedModel, tokens_N: Tensor
) -> None:
    tokens_WL = tokens_N[:96].view(6, 16)
    actual = compare(pruned, dense, tokens_WL)
    with torch.no_grad():
        p, q = (
            copy.deepcopy(model).double()(tokens_WL).logits[:, :-1].softmax(-1)
            for model in (dense, pruned)
        )
    divergence = (p * (p / q).log()).sum(-1).mean(1)
    torch.testing.assert_close(actual.divergence_W, divergence, rtol=1e-4, atol=1e-6)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    torch.testing.assert_close(actual.agreement_W, agreement)
    assert 0 < agreement.mean() < 1


def test_the_dense_loss_is_that_of_the_dense_model_alone(
    pruned: PreTrainedModel, dense: PreTrainedModel, tokens_N: Tensor
) -> None:
    tokens_WL = tokens_N[:96].view(6, 16)
    alone = score_windows(dense, tokens_WL, dtype=torch.float32)
    torch.testing.assert_close(compare(pruned, dense, tokens_WL).dense_loss_W, alone.loss_W)
    assert alone.comparison is None


def test_a_model_agrees_with_itself(dense: PreTrainedModel, tokens_N: Tensor) -> None:
    actual = compare(dense, dense, tokens_N[:96].view(6, 16))
    assert actual.agreement_W.tolist() == [1.0] * 6
    assert actual.divergence_W.abs().max() == 0


def test_the_divergence_is_that_of_the_dense_distribution() -> None:
    dense = torch.tensor([[0.5, 0.5]]).log()
    pruned = torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * torch.tensor([0.5 / 0.9, 0.5 / 0.1]).log().sum()
    assert kl_divergence(dense, pruned).item() == pytest.approx(expected.item())


def test_agreement_is_per_position() -> None:
    dense = Predictions(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    pruned = Predictions(torch.tensor([[0.4, 0.6], [0.3, 0.7]]))
    assert dense.agreement(pruned).tolist() == [1.0, 0.0]


def test_large_logits_leave_little_rounding_behind() -> None:
    generator = torch.Generator().manual_seed(0)
    dense_PV = 10 * torch.randn(8, 5000, generator=generator)
    near_PV = dense_PV + 0.01 * torch.randn(8, 5000, generator=generator)
    actual = Predictions(dense_PV).divergence(Predictions(near_PV))
    p, q = dense_PV.double().softmax(-1), near_PV.double().softmax(-1)
    torch.testing.assert_close(actual.double(), (p * (p / q).log()).sum(-1), rtol=0, atol=1e-5)
