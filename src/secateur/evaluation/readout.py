"""Logits of many positions without ever holding all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Readout:
    """The two halves of a forward pass.

    Attributes:
        states: from token ids (windows, length) to one state per position (windows, length, width).
        project: from states (positions, width) to logits (positions, vocabulary).
        separable: states are hidden states. If not, they are the logits themselves.
    """

    states: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    separable: bool


@torch.no_grad()
def find_readout(model: PreTrainedModel, tokens_WL: Tensor) -> Readout:
    """Split a model into its decoder and its output head.

    Some models cap or scale what the head returns, so the split is tried on the first few tokens:
    if decoder and head do not give the model's own logits, the model is taken as a whole.

    Args:
        model: a causal language model.
        tokens_WL: int64 (windows, length), of which the beginning serves as a probe.
    """

    def own_logits(tokens_WL: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens_WL, use_cache=False).logits
        return logits

    head = model.get_output_embeddings()
    decoder = model.base_model
    if head is None or decoder is model:
        return Readout(own_logits, lambda logits: logits, separable=False)

    def hidden(tokens_WL: Tensor) -> Tensor:
        output: Tensor = decoder(input_ids=tokens_WL, use_cache=False).last_hidden_state
        return output

    probe = tokens_WL[:1, :_PROBE_TOKENS].to(model.device)
    expected = own_logits(probe).float()
    try:
        actual = head(hidden(probe)).float()
    except (AttributeError, RuntimeError, TypeError):
        # Anything may stand between decoder and head; the model itself knows.
        actual = torch.empty(0)
    if actual.shape == expected.shape and torch.allclose(actual, expected, equal_nan=True):
        return Readout(hidden, head, separable=True)
    return Readout(own_logits, lambda logits: logits, separable=False)
