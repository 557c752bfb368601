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
    begin_windows,
    beginning_of_text_token,
    draw_windows,
    end_of_text_token,
    read_tokens,
)
from secateur.text.sources import SELF, Part, find_texts

# Of a larger source only the beginning is used: it has to be tokenised before windows are drawn.
_POOL_TOKENS = 1_000_000
_POOL_WINDOWS = 32
# Self-written samples beyond those needed, of which the least likely are dropped.
_SURPLUS = 0.25

ModelLoader = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Calibration:
    """The text statistics come from.

    Attributes:
        tokens: int64 (samples, length), on the CPU.
        description: what the text is, for the report; plain values that JSON can hold.
    """

    tokens: Tensor
    description: dict[str, Any]


def load_calibration(
    options: CalibrationOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_loader: ModelLoader | None = None,
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
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a source is missing, unreadable or too short.
    """
    return read_calibration(options, tokenizer, progress)(model_loader)


def read_calibration(
    options: CalibrationOptions,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = silent,
) -> Callable[[ModelLoader | None], Calibration]:
    """Read and cut all calibration text that no model has to write.

    Arguments and errors are those of ``load_calibration``.

    Returns:
        What lets the model write the rest, and returns the whole.
    """
    parts = find_texts(options.source, own=True)
    first = beginning_of_text_token(tokenizer) if options.bos else None
    generator = torch.Generator().manual_seed(options.seed)
    windows: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for part, samples in zip(parts, options.shares.values(), strict=True):
        if samples == 0:
            raise SecateurError(
                f"{part.name} gets none of the {options.samples} calibration samples; raise its "
                "weight or the number of samples, or leave it out."
            )
        if part.sources:
            body = options.length - (first is not None)
            tokens_SL, facts = _draw(part, tokenizer, samples, body, generator, progress)
            windows[part.name] = begin_windows(tokens_SL, first), facts
    order_S = torch.arange(options.samples)
    if len(parts) > 1:
        order_S = torch.randperm(options.samples, generator=generator)

    def complete(model_loader: ModelLoader | None) -> Calibration:
        if SELF in options.shares:
            windows[SELF] = _write(model_loader, tokenizer, options, progress)
        drawn = [windows[part.name] for part in parts]
        tokens_SL = torch.cat([part_SL for part_SL, _ in drawn])[order_S]
        description = {
            **options.model_dump(mode="json"),
            "tokens": tokens_SL.numel(),
            "sha256": hashlib.sha256(tokens_SL.numpy().astype("<i8").tobytes()).hexdigest(),
            "parts": [
                {"source": part.name, "samples": len(part_SL), **facts}
                for part, (part_SL, facts) in zip(parts, drawn, strict=True)
            ],
        }
        return Calibration(tokens_SL, description)

    return complete


def source_files(options: CalibrationOptions) -> list[Path]:
    """The local files among the sources.

    Raises:
        SecateurError: a source is neither an existing text file nor formed like a hub name.
    """
    sources = [source for part in find_texts(options.source, own=True) for source in part.sources]
    return [source for source in sources if isinstance(source, Path)]


def _draw(
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    limit = max(_POOL_TOKENS, _POOL_WINDOWS * samples * length)
    stream = read_tokens(part.sources, tokenizer, limit, progress)
    if stream.documents == 0:
        raise SecateurError(
            f"The calibration text {part.name} is empty; name a text with words in it."
        )
    available = len(stream.tokens_N)
    if available < length:
        raise SecateurError(
            f"The calibration text {part.name} has {available} tokens and a window needs {length}; "
            "use a longer text or shorter windows."
        )
    separator = end_of_text_token(tokenizer)
    facts = {
        "documents": stream.documents,
        "available_tokens": available,
        "capped": stream.capped,
        "separator": None if separator is None else tokenizer.convert_ids_to_tokens(separator),
    }
    return draw_windows(stream.tokens_N, samples, length, generator).long(), facts


def _write(
    model_loader: ModelLoader | None,
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    if model_loader is None:
        raise SecateurError(
            "Calibration text written by the model needs the dense model, which is not at hand "
            "here; name a text file instead of self."
        )
    start = tokenizer.bos_token_id if options.bos else end_of_text_token(tokenizer)
    if start is None:
        raise SecateurError(
            "The tokenizer has no special token to begin a text with, so the model cannot write "
            "calibration text; name a text file instead of self."
        )
    samples = options.shares[SELF]
    written = math.ceil(samples * (1 + _SURPLUS))
    text = generate(
        model_loader(), written, options.length, start=start, seed=options.seed, progress=progress
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
