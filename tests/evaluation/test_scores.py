from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.evaluation.scores import score_windows
from secateur.evaluation.text import split_windows
from secateur.runs.errors import SecateurError


def perplexity(
    model: PreTrainedModel,
    tokens_N: Tensor,
    window: int,
    max_windows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    windows_WL = split_windows(tokens_N, window, max_windows)
    return math.exp(float(score_windows(model, windows_WL, dtype=dtype).loss_W.mean()))


def brute_force(model: PreTrainedModel, tokens_N: Tensor, window: int, windows: int) -> float:
    """Token by token in float64."""
    model = copy.deepcopy(model).double().eval()
    means = []
    for index in range(windows):
        tokens = tokens_N[index * window : (index + 1) * window]
        losses = []
        for position in range(1, window):
            with torch.no_grad():
                logits = model(tokens[None, :position]).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[tokens[position]]))
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


def test_perplexity_is_that_of_brute_force(dense: PreTrainedModel, tokens_N: Tensor) -> None:
    # 100 tokens hold six windows of 16 and a tail that is dropped.
    expected = brute_force(dense, tokens_N, 16, 6)
    actual = perplexity(dense, tokens_N, 16, dtype=torch.float32)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_the_first_windows_only(dense: PreTrainedModel, tokens_N: Tensor) -> None:
    expected = brute_force(dense, tokens_N, 16, 2)
    assert perplexity(dense, tokens_N, 16, 2, dtype=torch.float32) == pytest.approx(
        expected, rel=1e-5
    )
    assert perplexity(dense, tokens_N, 16, 99, dtype=torch.float32) == perplexity(
        dense, tokens_N, 16, dtype=torch.float32
    )


def test_bfloat16_is_close(dense: PreTrainedModel, tokens_N: Tensor) -> None:
    exact = perplexity(dense, tokens_N, 16, dtype=torch.float32)
    rounded = perplexity(dense, tokens_N, 16, dtype=torch.bfloat16)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("tokens", "logits"), [(1, 1), (40, 7 * 260), (10**6, 10**9)])
def test_batches_and_slices_do_not_show(
    dense: PreTrainedModel,
    tokens_N: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    logits: int,
) -> None:
    expected = score_windows(dense, tokens_N[:96].view(6, 16), dtype=torch.float32).loss_W
    monkeypatch.setattr("secateur.evaluation.scores._BATCH_TOKENS", tokens)
    monkeypatch.setattr("secateur.evaluation.scores.LOGITS", logits)
    actual = score_windows(dense, tokens_N[:96].view(6, 16), dtype=torch.float32).loss_W
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual.dtype == torch.float64


def test_the_model_stays_in_training_mode_if_it_was(
    dense: PreTrainedModel, tokens_N: Tensor
) -> None:
    model = copy.deepcopy(dense).train()
    perplexity(model, tokens_N, 16)
    assert model.training


def test_a_broken_model_is_no_number(dense: PreTrainedModel, tokens_N: Tensor) -> None:
    broken = copy.deepcopy(dense)
    broken.get_input_embeddings().weight.data[tokens_N[40]] = float("nan")
    with pytest.raises(SecateurError, match="NaN or infinite in window"):
        perplexity(broken, tokens_N, 16)
