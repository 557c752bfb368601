"""How learning rates and decays move over the steps of a run."""

from __future__ import annotations

import math


def warm_up_cosine(step: int, steps: int, *, rise: int, fall: int, floor: float) -> float:
    """Share of the highest learning rate: a linear rise to 1, half a cosine, a line to 0.

    Args:
        step: steps already taken.
        steps: in all.
        rise: steps of the rise.
        fall: step at which the cosine ends at ``floor`` and the line begins.
        floor: where the cosine ends.
    """
    if step < rise:
        return (step + 1) / rise
    if fall <= step < steps:
        return floor * (steps - step) / (steps - fall)
    done = (step - rise) / max(1, fall - rise)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def ramp(step: int, steps: int, share: float) -> float:
    """Linear from 0 at the first step to 1 after ``share`` of all steps, then 1 (AST, eq. 4)."""
    return min(1.0, step / (share * steps)) if share > 0 else 1.0
