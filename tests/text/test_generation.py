from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from secateur.runs.errors import SecateurError
from secateur.text.generation import Generated, generate
from tiny import FAMILIES

START = 1


def next_token_log_probabilities(model: PreTrainedModel, tokens_SL: Tensor) -> Tensor:
    """Without a cache, float64 (samples, length - 1, vocabulary)."""
    with torch.no_grad():
        return model(tokens_SL, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def test_samples_begin_with_the_start_token(writer: LlamaForCausalLM) -> None:
    text = generate(writer, 5, 12, start=START, seed=0)
    assert text.tokens_SL.shape == (5, 12)
    assert text.tokens_SL.dtype == torch.int64
    assert (text.tokens_SL[:, 0] == START).all()
    assert len(text.tokens_SL.unique(dim=0)) == 5


def test_the_seed_decides_and_the_global_random_state_does_not(writer: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    first = generate(writer, 4, 12, start=START, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = generate(writer, 4, 12, start=START, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.tokens_SL, second.tokens_SL)
    assert torch.equal(first.log_likelihood_S, second.log_likelihood_S)
    assert not torch.equal(first.tokens_SL, generate(writer, 4, 12, start=START, seed=8).tokens_SL)


def test_the_model_stays_as_it_is(writer: LlamaForCausalLM) -> None:
    model = copy.deepcopy(writer).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    generate(model, 2, 4, start=START, seed=0)
    assert model.training
    assert model.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_wide_model_writes_what_its_bf16_copy_writes(writer: LlamaForCausalLM) -> None:
    narrow = copy.deepcopy(writer)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = generate(narrow, 4, 12, start=START, seed=0)
    actual = generate(writer, 4, 12, start=START, seed=0)
    assert torch.equal(actual.tokens_SL, expected.tokens_SL)


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_is_that_of_a_forward_without_cache(
    checkpoints: Callable[..., Path], family: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints(family, torch.bfloat16), dtype=torch.bfloat16
    )
    text = generate(model, 3, 20, start=START, seed=0)
    log_p = next_token_log_probabilities(model, text.tokens_SL)
    expected = log_p.gather(2, text.tokens_SL[:, 1:, None]).squeeze(2).mean(1)
    torch.testing.assert_close(text.log_likelihood_S, expected, rtol=0.02, atol=0.02)


def test_samples_follow_the_models_distribution(writer: LlamaForCausalLM) -> None:
    text = generate(writer, 20_000, 2, start=START, seed=0, temperature=2.0, top_k=0)
    counted = text.tokens_SL[:, 1].bincount(minlength=writer.config.vocab_size) / 20_000
    start = torch.full((1, 2), START)
    expected = (next_token_log_probabilities(writer, start)[0, 0] / 2).softmax(-1)
    # Total variation; 20,000 draws over 260 tokens leave about 0.04 of sampling noise.
    assert (counted - expected).abs().sum() / 2 < 0.06


def test_only_the_likeliest_tokens_are_sampled(writer: LlamaForCausalLM) -> None:
    text = generate(writer, 2_000, 2, start=START, seed=0, temperature=5.0, top_k=4)
    expected = next_token_log_probabilities(writer, torch.full((1, 2), START))[0, 0].topk(4).indices
    assert set(text.tokens_SL[:, 1].tolist()) == set(expected.tolist())


def test_batches_follow_each_other(writer: LlamaForCausalLM) -> None:
    calls: list[tuple[str, int, int]] = []
    text = generate(
        writer, 7, 5, start=START, seed=0, batch=3, progress=lambda *call: calls.append(call)
    )
    assert text.tokens_SL.shape == (7, 5)
    assert len(text.tokens_SL.unique(dim=0)) == 7
    assert calls == [("Writing calibration text", step, 12) for step in range(1, 13)]


def test_the_likeliest_samples_stay_in_order() -> None:
    text = Generated(torch.arange(5)[:, None], torch.tensor([-3.0, -1.0, -2.0, -4.0, -1.0]))
    kept = text.likeliest(3)
    assert kept.tokens_SL.flatten().tolist() == [1, 2, 4]
    assert kept.log_likelihood_S.tolist() == [-1.0, -2.0, -1.0]


def test_a_broken_model_cannot_write(writer: LlamaForCausalLM) -> None:
    broken = copy.deepcopy(writer)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(SecateurError, match="logits are NaN or infinite"):
        generate(broken, 2, 4, start=START, seed=0)
