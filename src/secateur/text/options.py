"""What the user may say about calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field, field_validator

from secateur.runs.options import Options


class CalibrationOptions(Options):
    """Which text statistics come from, and how much of it."""

    source: str | dict[str, float] = Field(
        "self", description="self, FILE.txt, FILE.jsonl, a hub name, or a mix {source: weight}"
    )
    samples: int = Field(128, description="windows, held-out ones included")
    length: int = Field(512, description="tokens per window")
    seed: int = Field(0, ge=0, lt=2**47, description="decides windows and sampled text")
    bos: bool = Field(
        False, description="begin every window with the beginning-of-text token, as Gemma needs"
    )

    @field_validator("source")
    @classmethod
    def _source_is_named(cls, source: str | dict[str, float]) -> str | dict[str, float]:
        weights = {source: 1.0} if isinstance(source, str) else source
        if not weights:
            raise ValueError("a mix needs at least one source, such as {c4: 1, code.jsonl: 1}")
        for name, weight in weights.items():
            if not name.strip():
                raise ValueError("a source needs a name; write self or a file's")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"the weight of {name} is {weight}; give a positive number")
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

    @property
    def shares(self) -> dict[str, int]:
        """Samples per source, divided by largest remainder."""
        if isinstance(self.source, str):
            return {self.source: self.samples}
        return divide(self.samples, self.source)


def fitted_share(samples: int) -> int:
    """Windows that methods fit to unless more is said; the quarter behind them is held out."""
    return samples * 3 // 4


def divide(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide a number in proportion to positive weights, by largest remainder."""
    whole = math.fsum(weights.values())
    quotas = {name: total * weight / whole for name, weight in weights.items()}
    shares = {name: int(quota) for name, quota in quotas.items()}
    # sorted() is stable: among equal remainders the source named first comes first.
    by_remainder = sorted(quotas, key=lambda name: shares[name] - quotas[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
