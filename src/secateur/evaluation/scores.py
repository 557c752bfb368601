"""Score windows of text: loss per window, and the distance from a dense model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.blocks.precision import forward_precision
from secateur.evaluation.predictions import Predictions, find_readout
from secateur.runs.errors import SecateurError
from secateur.runs.limits import LOGITS, rows_at_once, tokens_at_once
from secateur.runs.progress import Progress, silent
from secateur.text.generation import evaluation_mode

# Tokens in one forward pass.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one: means over the positions of each window, float64 (windows,).

    Attributes:
        dense_loss_W: negative log-likelihood of the dense model in nats.
        divergence_W: Kullback-Leibler divergence KL(dense ‖ model) in nats.
        agreement_W: share of positions where both find the same token likeliest.
    """

    dense_loss_W: Tensor
    divergence_W: Tensor
    agreement_W: Tensor


@dataclass(frozen=True)
class Scores:
    """How well a model predicts windows of text.

    Attributes:
        loss_W: negative log-likelihood in nats, mean over the positions of each window, float64.
        comparison: if a dense model was given.
    """

    loss_W: Tensor
    comparison: Comparison | None = None


@torch.no_grad()
def score_windows(
    model: PreTrainedModel,
    tokens_WL: Tensor,
    *,
    dense: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    require_finite: bool = True,
    progress: Progress = silent,
) -> Scores:
    """Predict each token of each window from those before it in the window.

    Both models walk through the text together and logits are made for a slice of positions at a
    time, so memory does not grow with the text. Softmax and everything after it are fp32.

    Args:
        model: a causal language model on any device.
        tokens_WL: int64 (windows, length); length - 1 positions of each are predicted.
        dense: a model of the same vocabulary to measure the distance from.
        dtype: of matrix products; bfloat16 means autocast.
        require_finite: refuse NaN and infinite logits rather than return their losses.
        progress: called after each batch of windows.

    Raises:
        SecateurError: logits are NaN or infinite, and that is not wanted.
    """
    windows, length = tokens_WL.shape
    models = [model] if dense is None else [model, dense]
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluation_mode(each))
        # One context for all windows: autocast keeps the weights it has converted.
        for device in {each.device for each in models}:
            stack.enter_context(forward_precision(dtype, device))
        readouts = [find_readout(each, tokens_WL) for each in models]
        rows: list[Tensor] = []
        # A model taken as a whole makes the logits of every position at once.
        whole = not all(readout.separable for readout in readouts)
        batch = 1 if whole else max(1, tokens_at_once(_BATCH_TOKENS) // length)
        step = rows_at_once(LOGITS, model.config.get_text_config().vocab_size)
        for start in range(0, windows, batch):
            tokens = tokens_WL[start : start + batch]
            states = [
                readout.states(tokens.to(each.device))[:, :-1].flatten(0, 1)
                for readout, each in zip(readouts, models, strict=True)
            ]
            targets = tokens[:, 1:].flatten()
            slices = [
                _compare(
                    [
                        readout.project(state[at : at + step]).float().to(model.device)
                        for readout, state in zip(readouts, states, strict=True)
                    ],
                    targets[at : at + step].to(model.device),
                )
                for at in range(0, len(targets), step)
            ]
            values = torch.cat(slices, dim=1).double()
            rows.append(values.unflatten(1, (len(tokens), length - 1)).mean(-1).cpu())
            progress("Evaluating", min(start + batch, windows), windows)
    values = torch.cat(rows, dim=1)
    if require_finite and not values.isfinite().all():
        window = int((~values.isfinite()).any(0).nonzero()[0])
        raise SecateurError(
            f"Logits are NaN or infinite in window {window} of the text; check the model's weights."
        )
    loss_W, *compared = values
    return Scores(loss_W, Comparison(*compared) if compared else None)


def _compare(logits: list[Tensor], targets_P: Tensor) -> Tensor:
    """Loss, and with a dense model its loss, divergence and agreement: (1 or 4, positions)."""
    predictions = [Predictions(each_PV) for each_PV in logits]
    losses = [each.loss(targets_P) for each in predictions]
    if len(predictions) == 1:
        return torch.stack(losses)
    pruned, dense = predictions
    return torch.stack([*losses, dense.divergence(pruned), dense.agreement(pruned)])
