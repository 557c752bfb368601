"""The language model that lm-eval asks for log-likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import PreTrainedModel

from secateur.blocks.precision import forward_precision
from secateur.evaluation.predictions import Readout, find_readout
from secateur.models.structure import positions_of
from secateur.runs.errors import SecateurError
from secateur.runs.limits import LOGITS, rows_at_once
from secateur.runs.progress import Progress, silent
from secateur.text.encoder import Encoder
from secateur.text.generation import evaluation_mode

# Tokens in one forward pass to begin with, padding included; a CPU gains nothing from more.
_TOKENS = 2048
_TOKENS_CUDA = 32768
# What lm-eval assumes of a model that does not say how long its inputs may be.
_UNLIMITED = 2048

# What lm-eval passes on: (context, continuation) as text and as tokens.
Request = tuple[tuple[str, str], list[int], list[int]]


class Likelihood(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods of continuations, in batches that fit.

    Only the positions of continuations are turned into logits, and inputs that several requests
    share are computed once. Prompts and tokens are those of lm-eval's own Hugging Face model.

    Args:
        model: a causal language model, where it is.
        encoder: its tokenizer, and the token that a prompt begins with.
        dtype: of matrix products; bfloat16 means autocast.
        progress: called with (phase, done, total) after each batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        dtype: torch.dtype,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        self.dtype = dtype
        self.progress = progress
        self.max_length = positions_of(model.config) or _UNLIMITED
        self.batch_tokens = _TOKENS_CUDA if model.device.type == "cuda" else _TOKENS

    @property
    def eot_token_id(self) -> int:
        end = self.encoder.separator
        if end is None:
            raise SecateurError(
                "The tokenizer has no end-of-text token, which tasks need; name it in "
                "tokenizer_config.json."
            )
        self.encoder.check([end])
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without a context."""
        return self.eot_token_id if self.encoder.first is None else self.encoder.first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; a beginning-of-text token that is there already is not repeated."""
        if add_special_tokens is None:
            return self.encoder.begun(string)
        return self.encoder.encode([string])[0]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As lm-eval's, whose progress bars would break ours."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        raise NotImplementedError("Only tasks that choose among continuations are offered.")

    generate_until = loglikelihood_rolling

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request: log-likelihood in nats, and whether it is the likeliest throughout."""
        sharers: dict[tuple[int, ...], list[int]] = {}
        for index, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SecateurError(
                    f"A choice of {len(continuation)} tokens is longer than the "
                    f"{self.max_length} positions of the model; leave its task out."
                )
            # What is too long loses its beginning; the last token is only predicted.
            row = (context + continuation)[-self.max_length - 1 : -1]
            sharers.setdefault(tuple(row), []).append(index)
        # The longest come first, so that what does not fit shows at once.
        rows = sorted(sharers, key=lambda row: (-len(row), row))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(forward_precision(self.dtype, self.model.device))
            readout = find_readout(self.model, torch.tensor(rows[:1]))
            start = 0
            while start < len(rows):
                count = max(1, self.batch_tokens // len(rows[start]))
                batch = rows[start : start + count]
                asked = [(at, index) for at, row in enumerate(batch) for index in sharers[row]]
                targets = [requests[index][2] for _at, index in asked]
                try:
                    found = self._score(readout, batch, [at for at, _index in asked], targets)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    self.batch_tokens = len(batch) // 2 * len(rows[start])
                    continue
                for (_at, index), answer in zip(asked, found, strict=True):
                    answers[index] = answer
                start += len(batch)
                self.progress("Scoring choices", start, len(rows))
        return answers

    def _score(
        self,
        readout: Readout,
        batch: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        targets: Sequence[list[int]],
    ) -> list[tuple[float, bool]]:
        """Score targets, each at the end of one of the rows."""
        device = self.model.device
        # Padding stands behind what is read and a causal model does not look ahead.
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in batch], batch_first=True
        )
        states: Tensor = readout.states(tokens.to(device))
        places = [
            (row, len(batch[row]) - len(target) + offset, token, owner)
            for owner, (row, target) in enumerate(zip(rows, targets, strict=True))
            for offset, token in enumerate(target)
        ]
        row_P, column_P, token_P, owner_P = torch.tensor(places, device=device).unbind(1)
        states = states[row_P, column_P]
        step = rows_at_once(LOGITS, self.model.config.get_text_config().vocab_size)
        parts: list[Tensor] = []
        for at in range(0, len(states), step):
            log_PV = readout.project(states[at : at + step]).float().log_softmax(-1)
            wanted_P = token_P[at : at + step]
            value_P = log_PV.gather(1, wanted_P[:, None]).squeeze(1)
            parts.append(torch.stack([value_P, (log_PV.argmax(-1) != wanted_P).float()]))
        sums = torch.zeros(2, len(targets), dtype=torch.float64, device=device)
        sums.index_add_(1, owner_P, torch.cat(parts, dim=1).double())
        if sums.isnan().any():
            raise SecateurError("Logits are NaN in a zero-shot task; check the model's weights.")
        values, misses = sums.tolist()
        return [(value, missed == 0) for value, missed in zip(values, misses, strict=True)]
