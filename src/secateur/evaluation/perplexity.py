"""Perplexity in the protocol of the pruning papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.evaluation.scores import score_windows
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent


def split_windows(
    tokens_N: Tensor, window: int, max_windows: int | None = None, bos: int | None = None
) -> Tensor:
    """Cut tokens into consecutive windows that do not overlap; the incomplete tail is dropped.

    Args:
        tokens_N: int64 (tokens,).
        window: tokens per window.
        max_windows: take the first so many.
        bos: a token put in front of every window, which counts as one of its tokens.

    Returns:
        int64 (windows, window).

    Raises:
        SecateurError: a window cannot predict anything, or the text is shorter than one window.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise SecateurError(
            f"{max_windows if window > 1 else 'A'} windows of {window} tokens predict nothing; "
            "use at least one window of two tokens."
        )
    body = window if bos is None else window - 1
    count = len(tokens_N) // body
    if count == 0:
        raise SecateurError(
            f"The evaluation text has {len(tokens_N)} tokens and one window needs {body}; use a "
            "longer text or a shorter window."
        )
    count = count if max_windows is None else min(count, max_windows)
    windows_WL = tokens_N[: count * body].view(count, body)
    if bos is None:
        return windows_WL
    return torch.cat([torch.full((count, 1), bos, dtype=tokens_N.dtype), windows_WL], dim=1)


def perplexity(
    model: PreTrainedModel,
    tokens_N: Tensor,
    window: int,
    max_windows: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
) -> float:
    """Token perplexity: exp of the mean over windows of the mean loss in each.

    Windows do not overlap, the tail is dropped, and window - 1 positions of each are predicted.

    Args:
        model: a causal language model on any device.
        tokens_N: int64 (tokens,), the text tokenised whole.
        window: tokens per window.
        max_windows: use the first so many.
        dtype: of matrix products; bfloat16 means autocast.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: the text is shorter than one window, or logits are NaN or infinite.
    """
    windows_WL = split_windows(tokens_N, window, max_windows)
    scores = score_windows(model, windows_WL, dtype=dtype, progress=progress)
    return math.exp(float(scores.loss_W.mean()))
