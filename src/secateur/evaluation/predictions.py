"""Next tokens as a model sees them, without ever holding the logits of a whole text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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

    def hidden(tokens_WL: Tensor) -> Tensor:
        output: Tensor = decoder(input_ids=tokens_WL, use_cache=False).last_hidden_state
        return output

    whole = Readout(own_logits, lambda logits: logits, separable=False)
    head, decoder = model.get_output_embeddings(), model.base_model
    if head is None or decoder is model:
        return whole
    probe = tokens_WL[:1, :_PROBE_TOKENS].to(model.device)
    expected = own_logits(probe).float()
    try:
        actual = head(hidden(probe)).float()
    except (AttributeError, RuntimeError, TypeError):
        # Anything may stand between decoder and head; the model itself knows.
        return whole
    alike = actual.shape == expected.shape and torch.allclose(actual, expected, equal_nan=True)
    return Readout(hidden, head, separable=True) if alike else whole


@dataclass(frozen=True)
class Predictions:
    """Next tokens as a model sees them, without a table of their log-probabilities.

    Over a vocabulary such a table costs more to fill than the matrix product that logits come from.

    Attributes:
        logits_PV: fp32 (positions, vocabulary).
    """

    logits_PV: Tensor

    @cached_property
    def total_P(self) -> Tensor:
        """Logarithm of what softmax divides by."""
        return self.logits_PV.logsumexp(-1)

    @cached_property
    def probability_PV(self) -> Tensor:
        return self.logits_PV.sub(self.total_P[:, None]).exp_()

    def loss(self, targets_P: Tensor) -> Tensor:
        """Negative log-probability of one token for each position, nats (positions,)."""
        return self.total_P - self.logits_PV.gather(1, targets_P[:, None]).squeeze(1)

    def divergence(self, other: Predictions) -> Tensor:
        """KL(these ‖ the other's) in nats for each position, (positions,); 0 for the same ones."""
        # The difference first: sums of large logits would leave their rounding behind.
        distance_PV = self.logits_PV - other.logits_PV
        moved_P: Tensor = torch.linalg.vecdot(self.probability_PV, distance_PV)
        return moved_P + (other.total_P - self.total_P)

    def agreement(self, other: Predictions) -> Tensor:
        """1 where both find the same token likeliest, 0 elsewhere: fp32 (positions,)."""
        return (self.logits_PV.argmax(-1) == other.logits_PV.argmax(-1)).float()


def kl_divergence(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) in nats at each position, fp32 (positions,).

    Args:
        dense_PV: log-probabilities (positions, vocabulary) of the dense model.
        pruned_PV: those of the pruned model.
    """
    return (dense_PV.exp() * (dense_PV - pruned_PV)).sum(-1)
