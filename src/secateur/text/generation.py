"""Calibration text that the dense model writes itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent

_CACHE_BYTES = 2 * 2**30
_LARGEST_BATCH = 256


@dataclass(frozen=True)
class Generated:
    """Text a model has written.

    Attributes:
        tokens_SL: int64 (samples, length), on the CPU.
        log_likelihood_S: float64 (samples,), mean log-probability in nats of the sampled tokens
            under the model's full distribution at temperature 1.
    """

    tokens_SL: Tensor
    log_likelihood_S: Tensor

    def likeliest(self, samples: int) -> Generated:
        """The sequences of highest likelihood, in the order they were written.

        The others are better left out (Ji et al., "Beware of calibration data for pruning large
        language models", 2025).
        """
        order = self.log_likelihood_S.argsort(descending=True, stable=True)
        kept = order[:samples].sort().values
        return Generated(self.tokens_SL[kept], self.log_likelihood_S[kept])


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    samples: int,
    length: int,
    *,
    start: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 50,
    batch: int | None = None,
    progress: Progress = silent,
) -> Generated:
    """Sample ``samples`` sequences of ``length`` tokens, the start token included.

    A model is the nearest source of text such as it was trained on (Williams et al.,
    "Self-calibration for language model quantization and pruning", 2025). Sampling goes on after
    an end-of-text token, so a sequence may hold several documents, as a packed window does. The
    noise has a generator of its own, on the CPU. The model is only read; weights wider than 16
    bits are used through a bf16 copy, which is several times as fast on a CPU.

    Args:
        model: the dense model, on any device.
        samples: number of sequences.
        length: tokens per sequence.
        start: the token that every sequence starts with.
        seed: decides the noise.
        temperature: divides the logits; at 1 the model's own distribution is sampled.
        top_k: sample among the k likeliest tokens; 0 means among all.
        batch: sequences at a time; by default as many as a cache of 2 GiB holds, 256 at most.
        progress: called after every token of a batch.

    Raises:
        SecateurError: the model's logits are NaN or infinite.
    """
    noise = torch.Generator().manual_seed(seed)
    rounds = math.ceil(samples / (batch or _batch_size(model, length)))
    steps = length - 1
    parts: list[Generated] = []
    with _reading(model) as forward:
        for index in range(rounds):
            size = samples * (index + 1) // rounds - samples * index // rounds
            cache = _cache(model, length)
            tokens = [torch.full((size, 1), start, device=model.device)]
            log_likelihood_S = torch.zeros(size, dtype=torch.float64, device=model.device)
            for step in range(steps):
                logits_SV = forward(tokens[-1], cache)
                chosen_S1, log_p_S = _sample(logits_SV, noise, temperature, top_k)
                tokens.append(chosen_S1)
                log_likelihood_S += log_p_S
                done = index * steps + step + 1
                progress("Writing calibration text", done, rounds * steps)
            if not log_likelihood_S.isfinite().all():
                raise SecateurError(
                    "The model's logits are NaN or infinite, so it cannot write calibration text; "
                    "check its weights, or calibrate on a text file."
                )
            parts.append(Generated(torch.cat(tokens, 1).cpu(), (log_likelihood_S / steps).cpu()))
    return Generated(
        torch.cat([part.tokens_SL for part in parts]),
        torch.cat([part.log_likelihood_S for part in parts]),
    )


def writing_bytes(model: PreTrainedModel, dtype: torch.dtype, samples: int, length: int) -> int:
    """Memory that ``generate`` and the model itself take, bytes.

    Args:
        model: the dense model, with or without weights.
        dtype: that it is loaded in.
        samples: to write.
        length: tokens of a sample.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    copies = 2 if dtype.itemsize > 2 else 0
    batch = min(samples, _batch_size(model, length))
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    # Logits in the dtype of the products, in fp32, and what the sum of exponentials takes.
    logits = batch * vocabulary * (2 + 3 * 4)
    return weights * (dtype.itemsize + copies) + batch * _sequence_bytes(model, length) + logits


def _sample(
    logits_SV: Tensor, noise: torch.Generator, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Add Gumbel noise to the logits, of which the largest is the sample (S, 1).

    Returns:
        The tokens (S, 1), and their log-probabilities at temperature 1 (S,).
    """
    vocabulary = logits_SV.shape[-1]
    likeliest_SK, ids_SK = logits_SV.topk(min(top_k, vocabulary) if top_k else vocabulary)
    waits_SK = torch.empty(likeliest_SK.shape).exponential_(generator=noise)
    gumbel_SK = -waits_SK.to(logits_SV.device).log()
    chosen_S1 = (likeliest_SK / temperature + gumbel_SK).argmax(-1, keepdim=True)
    log_p_S = likeliest_SK.gather(1, chosen_S1).squeeze(1) - logits_SV.logsumexp(-1)
    return ids_SK.gather(1, chosen_S1), log_p_S.double()


@contextmanager
def _reading(model: PreTrainedModel) -> Iterator[Callable[[Tensor, DynamicCache], Tensor]]:
    """Give a function from tokens (S, 1) to next-token logits fp32 (S, vocabulary)."""
    narrow = {
        name: parameter.to(torch.bfloat16)
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float32, torch.float64)
    }

    # With a mask, even one that hides nothing, transformers attends with all query heads of a group
    # at once; without one torch's grouped attention takes several times as long on a CPU.
    grouped = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    masked = grouped and model.device.type == "cpu"

    def forward(tokens_S1: Tensor, cache: DynamicCache) -> Tensor:
        inputs: dict[str, object] = {
            "input_ids": tokens_S1,
            "past_key_values": cache,
            "use_cache": True,
        }
        if masked and all(type(layer) is _PreallocatedLayer for layer in cache.layers):
            length = cache.get_seq_length() + 1
            inputs["attention_mask"] = torch.ones(1, 1, 1, length, dtype=torch.bool)
        output = functional_call(model, narrow, (), inputs) if narrow else model(**inputs)
        logits_SV: Tensor = output.logits[:, -1].float()
        return logits_SV

    with evaluation_mode(model):
        yield forward


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into one buffer; the usual one copies itself for every token."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty((*states.shape[:2], self._length, states.shape[3]))
                for states in (key_states, value_states)
            ]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def _cache(model: PreTrainedModel, length: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _PreallocatedLayer(length) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def _batch_size(model: PreTrainedModel, length: int) -> int:
    return max(1, min(_LARGEST_BATCH, _CACHE_BYTES // _sequence_bytes(model, length)))


def _sequence_bytes(model: PreTrainedModel, length: int) -> int:
    """Keys and values of one sequence in all blocks, in 16 bits."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * width * length)
