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
from secateur.text.encoder import Encoder
from secateur.text.generation import generate
from secateur.text.options import CalibrationOptions
from secateur.text.packing import begin_text, draw_windows, read_tokens, tokens_of_window
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


@dataclass(frozen=True)
class Draft:
    """Calibration text that has been read and cut, but for what a model has to write.

    Attributes:
        options: what the user named.
        encoder: of the model.
        windows: windows and facts of each part by name; the model's own are missing.
        order_S: in which the samples of all parts are used.
    """

    options: CalibrationOptions
    encoder: Encoder
    windows: dict[str, tuple[Tensor, dict[str, Any]]]
    order_S: Tensor

    def complete(
        self, model_loader: ModelLoader | None = None, progress: Progress = silent
    ) -> Calibration:
        """Let the model write the rest.

        Args:
            model_loader: returns the dense model, which is only read; called if the model has to
                write. bfloat16 weights save a copy.
            progress: called with (phase, done, total).

        Raises:
            SecateurError: the model has to write and is not at hand, or its logits are not finite.
        """
        options, windows = self.options, dict(self.windows)
        if SELF in options.shares:
            windows[SELF] = _write(model_loader, self.encoder, options, progress)
        drawn = [windows[name] for name in options.shares]
        tokens_SL = torch.cat([part_SL for part_SL, _ in drawn])[self.order_S]
        description = {
            **options.model_dump(mode="json"),
            "bos": self.encoder.bos,
            "tokens": tokens_SL.numel(),
            "sha256": hashlib.sha256(tokens_SL.numpy().astype("<i8").tobytes()).hexdigest(),
            "parts": [
                {"source": name, "samples": len(part_SL), **facts}
                for name, (part_SL, facts) in zip(options.shares, drawn, strict=True)
            ],
        }
        return Calibration(tokens_SL, description)


def load_calibration(
    options: CalibrationOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_loader: ModelLoader | None = None,
    rows: int | None = None,
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
        model_loader: as of ``Draft.complete``.
        rows: of the model's input embedding; None if they are not known.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a source is missing, unreadable or too short, or the tokenizer gives what
            the model has no row for.
    """
    encoder = Encoder.of(tokenizer, options.bos, rows)
    return read_calibration(options, encoder, progress).complete(model_loader, progress)


def read_calibration(
    options: CalibrationOptions, encoder: Encoder, progress: Progress = silent
) -> Draft:
    """Read, check and cut all calibration text that no model has to write.

    Errors are those of ``load_calibration``.
    """
    parts = find_texts(options.source, own=True)
    generator = torch.Generator().manual_seed(options.seed)
    windows: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for part, samples in zip(parts, options.shares.values(), strict=True):
        if samples == 0:
            raise SecateurError(
                f"{part.name} gets none of the {options.samples} calibration samples; raise its "
                "weight or the number of samples, or leave it out."
            )
        if part.sources:
            windows[part.name] = _draw(part, encoder, samples, options.length, generator, progress)
        else:
            _start(encoder)
    order_S = torch.arange(options.samples)
    if len(parts) > 1:
        order_S = torch.randperm(options.samples, generator=generator)
    return Draft(options, encoder, windows, order_S)


def source_files(options: CalibrationOptions) -> list[Path]:
    """The local files among the sources.

    Raises:
        SecateurError: a source is neither an existing text file nor formed like a hub name.
    """
    sources = [source for part in find_texts(options.source, own=True) for source in part.sources]
    return [source for source in sources if isinstance(source, Path)]


def samples_to_write(samples: int) -> int:
    """How many the model writes to have so many likely ones."""
    return math.ceil(samples * (1 + _SURPLUS))


def _draw(
    part: Part,
    encoder: Encoder,
    samples: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    body = length - (encoder.of_window is not None)
    limit = max(_POOL_TOKENS, _POOL_WINDOWS * samples * body)
    stream = read_tokens(part.sources, encoder, limit, progress)
    if stream.documents == 0:
        raise SecateurError(
            f"The calibration text {part.name} is empty; name a text with words in it."
        )
    available = len(stream.tokens_N)
    tokens_N = begin_text(stream.tokens_N, encoder.of_text)
    room = tokens_of_window(tokens_N, length, encoder.of_window)
    if len(tokens_N) < room:
        raise SecateurError(
            f"The calibration text {part.name} has {available} tokens and a window needs {room}; "
            "use a longer text or shorter windows."
        )
    facts = {
        "documents": stream.documents,
        "available_tokens": available,
        "capped": stream.capped,
        "separator": encoder.name(encoder.separator),
    }
    windows_SL = draw_windows(tokens_N, samples, length, generator, encoder.of_window)
    return windows_SL.long(), facts


def _start(encoder: Encoder) -> int:
    """The token that a model begins to write behind."""
    if encoder.start is None:
        raise SecateurError(
            "The tokenizer has no special token to begin a text with, so the model cannot write "
            "calibration text; name a text file instead of self."
        )
    encoder.check([encoder.start])
    return encoder.start


def _write(
    model_loader: ModelLoader | None,
    encoder: Encoder,
    options: CalibrationOptions,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    if model_loader is None:
        raise SecateurError(
            "Calibration text written by the model needs the dense model, which is not at hand "
            "here; name a text file instead of self."
        )
    start = _start(encoder)
    samples = options.shares[SELF]
    written = samples_to_write(samples)
    text = generate(
        model_loader(), written, options.length, start=start, seed=options.seed, progress=progress
    )
    kept = text.likeliest(samples)
    facts = {
        "written": written,
        "dropped": written - samples,
        "log_likelihood_written": float(text.log_likelihood_S.mean()),
        "log_likelihood_kept": float(kept.log_likelihood_S.mean()),
        "start": encoder.name(start),
    }
    return kept.tokens_SL, facts
