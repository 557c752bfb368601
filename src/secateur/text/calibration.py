"""From options to calibration tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent
from secateur.text.generation import generate
from secateur.text.options import CalibrationOptions
from secateur.text.packing import (
    CHARACTERS_PER_TOKEN,
    draw_windows,
    end_of_text_token,
    tokenize,
)
from secateur.text.sources import SELF, read_documents, resolve_source

# Of a larger source only the beginning is used: it has to be tokenised before windows are drawn.
_POOL_TOKENS = 1_000_000
_POOL_WINDOWS = 32
# Self-written samples beyond those needed, of which the least likely are dropped.
_SURPLUS = 0.25


@dataclass(frozen=True)
class Calibration:
    """The text statistics come from.

    Attributes:
        tokens: int64 (samples, length), on the CPU.
        description: what the text is, for the report; plain values that JSON can hold.
    """

    tokens: Tensor
    description: dict[str, Any]


def source_files(options: CalibrationOptions) -> list[Path]:
    """The local files among the sources.

    Raises:
        SecateurError: a source is neither an existing text file nor formed like a hub name.
    """
    resolved = [resolve_source(source) for source in options.shares if source != SELF]
    return [source for source in resolved if isinstance(source, Path)]


def load_calibration(
    options: CalibrationOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_loader: Callable[[], PreTrainedModel] | None = None,
    max_positions: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Return calibration tokens; the same options and text give the same tokens.

    Text sources: documents are tokenised one behind another with one end-of-text token between
    them, and windows start at positions drawn with the seed. Of a source of more than a million
    tokens, or 32 times those asked for, only that much from its beginning is used. The sources of
    a mix are packed apart and their windows shuffled.

    The source ``self``: a quarter more samples than needed are written by the dense model, and
    the least likely are dropped.

    Args:
        options: what the user named.
        tokenizer: the model's.
        model_loader: returns the dense model, which is only read; called if the model has to
            write. bfloat16 weights save a copy.
        max_positions: the longest sequence the model takes, None if there is no limit.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a source is missing, unreadable or too short, or windows are too long.
    """
    if max_positions is not None and options.length > max_positions:
        raise SecateurError(
            f"Calibration windows of {options.length} tokens are longer than the model's "
            f"{max_positions} positions; use a length of {max_positions} or less."
        )
    source_files(options)
    prefix = _prefix(options, tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    windows: list[Tensor] = []
    parts: list[dict[str, Any]] = []
    for source, samples in options.shares.items():
        if samples == 0:
            raise SecateurError(
                f"{source} gets none of the {options.samples} calibration samples; raise its "
                "weight or the number of samples, or leave it out."
            )
        if source == SELF:
            if model_loader is None:
                raise SecateurError(
                    "Calibration text written by the model needs the dense model, which is not "
                    "at hand here; name a text file instead of self."
                )
            tokens_SL, facts = _self_written(model_loader(), tokenizer, options, samples, progress)
        else:
            body = options.length - len(prefix)
            tokens_SL, facts = _packed(source, tokenizer, samples, body, generator, progress)
            tokens_SL = torch.cat([prefix.expand(samples, -1), tokens_SL], dim=1)
        windows.append(tokens_SL)
        parts.append({"source": source, "samples": samples, **facts})
    tokens_SL = torch.cat(windows)
    if len(windows) > 1:
        tokens_SL = tokens_SL[torch.randperm(len(tokens_SL), generator=generator)]
    description = {
        **options.model_dump(mode="json"),
        "tokens": tokens_SL.numel(),
        "sha256": hashlib.sha256(tokens_SL.numpy().astype("<i8").tobytes()).hexdigest(),
        "parts": parts,
    }
    return Calibration(tokens_SL, description)


def _prefix(options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if not options.bos:
        return torch.empty(0, dtype=torch.int64)
    if tokenizer.bos_token_id is None:
        raise SecateurError(
            "The tokenizer has no beginning-of-text token to begin windows with; set bos to false."
        )
    return torch.tensor([tokenizer.bos_token_id])


def _packed(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    limit = max(_POOL_TOKENS, _POOL_WINDOWS * samples * length)
    # One character more than will be tokenised shows that there is more.
    documents = read_documents(
        resolve_source(source), split="train", characters=CHARACTERS_PER_TOKEN * limit + 1
    )
    stream = tokenize(documents, tokenizer, limit, progress)
    if stream.documents == 0:
        raise SecateurError(
            f"The calibration text {source} is empty; name a text with words in it."
        )
    available = len(stream.tokens_N)
    if available < length:
        raise SecateurError(
            f"The calibration text {source} has {available} tokens and a window needs {length}; "
            "use a longer text or shorter windows."
        )
    separator = end_of_text_token(tokenizer)
    facts = {
        "documents": stream.documents,
        "available_tokens": available,
        "capped": stream.capped,
        "separator": None if separator is None else tokenizer.convert_ids_to_tokens(separator),
    }
    return draw_windows(stream.tokens_N, samples, length, generator), facts


def _self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    samples: int,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    start = tokenizer.bos_token_id if options.bos else end_of_text_token(tokenizer)
    if start is None:
        raise SecateurError(
            "The tokenizer has no special token to begin a text with, so the model cannot write "
            "calibration text; name a text file instead of self."
        )
    written = math.ceil(samples * (1 + _SURPLUS))
    text = generate(
        model, written, options.length, start=start, seed=options.seed, progress=progress
    )
    kept = text.likeliest(samples)
    facts = {
        "written": written,
        "dropped": written - samples,
        "log_likelihood_written": float(text.log_likelihood_S.mean()),
        "log_likelihood_kept": float(kept.log_likelihood_S.mean()),
        "start": tokenizer.convert_ids_to_tokens(start),
    }
    return kept.tokens_SL, facts
