"""What the user may say about calibration text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, field_validator, model_validator

from secateur.runs.options import Options
from secateur.text.beginning import BEGINNING, BeginningOption

# Hidden states of so many tokens fit on no disk.
_MOST_TOKENS = 2**28
# Shares of a mix are this number to one at most.
_LARGEST_WEIGHT = 1_000_000_000


class CalibrationOptions(Options):
    """Which text statistics come from, and how much of it."""

    source: str | dict[str, float] = Field(
        "self",
        description="self, FILE.txt, FILE.jsonl, a folder, a hub name, or a mix {source: weight}",
    )
    samples: int = Field(128, ge=1, le=2**40, description="windows, held-out ones included")
    length: int = Field(512, ge=1, le=2**40, description="tokens per window")
    seed: int = Field(0, ge=0, lt=2**47, description="decides windows and sampled text")
    bos: BeginningOption = Field(None, description=BEGINNING)

    @field_validator("source")
    @classmethod
    def _source_is_named(cls, source: str | dict[str, float]) -> str | dict[str, float]:
        weights = {source: 1.0} if isinstance(source, str) else source
        if not weights:
            raise ValueError("a mix needs at least one source, such as {c4: 1, code.jsonl: 1}")
        for name, weight in weights.items():
            if not name.strip():
                raise ValueError("a source needs a name; write self or a file's")
            if not 0 < weight <= _LARGEST_WEIGHT:
                raise ValueError(
                    f"the weight of {name} is {weight}; give a positive number up to "
                    f"{_LARGEST_WEIGHT:,}"
                )
        return source

    @field_validator("samples")
    @classmethod
    def _some_are_held_out(cls, samples: int) -> int:
        if samples < 4:
            raise ValueError(f"{samples} samples are too few, a quarter is held out; use 4 or more")
        return samples

    @field_validator("length")
    @classmethod
    def _windows_have_context(cls, length: int) -> int:
        if length < 2:
            raise ValueError(f"windows of {length} tokens are too short; use 2 or more")
        return length

    @model_validator(mode="after")
    def _tokens_fit_in_memory(self) -> CalibrationOptions:
        if self.samples * self.length > _MOST_TOKENS:
            raise ValueError(
                f"{self.samples} samples of {self.length} tokens are too many; use at most "
                f"{_MOST_TOKENS:,} tokens in all"
            )
        return self

    @property
    def shares(self) -> dict[str, int]:
        """Samples per source, divided by largest remainder."""
        weights = {self.source: 1.0} if isinstance(self.source, str) else self.source
        return dict(zip(weights, divide(self.samples, list(weights.values())), strict=True))


def fitted_share(samples: int) -> int:
    """Windows that methods fit to unless more is said; the quarter behind them is held out."""
    return samples * 3 // 4


def note_on_tokens(stages: Sequence[str], tokens: int, widest: int) -> list[str]:
    """Say so if a linear has more inputs than there are tokens to fit it on.

    Args:
        stages: what fits.
        tokens: that are fitted on.
        widest: inputs of the widest linear.
    """
    if not stages or tokens >= widest:
        return []
    return [
        f"{' and '.join(stages)} had {tokens:,} calibration tokens for linears of up to "
        f"{widest:,} inputs; give more --samples, several times as many tokens as inputs."
    ]


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number in proportion to positive weights, by largest remainder."""
    whole = math.fsum(weights)
    quotas = [total * weight / whole for weight in weights]
    shares = [int(quota) for quota in quotas]
    # sorted() is stable: among equal remainders the source named first comes first.
    by_remainder = sorted(range(len(quotas)), key=lambda index: shares[index] - quotas[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
