"""How learning rate and decay move over the steps."""

from __future__ import annotations

import math


def learning_rate_share(
    step: int, steps: int, *, warm_up: float = 0.05, tail: float = 0.05, floor: float = 0.1
) -> float:
    """Share of the highest learning rate at a step.

    A linear rise to 1, half a cosine down to ``floor``, a straight line to 0. The defaults are
    the GPT-2 recipe of AST: 2,000 of 40,000 steps up, the cosine until 38,000.

    Args:
        step: steps already taken, 0 <= step < steps.
        steps: in all.
        warm_up: share of the steps that rise.
        tail: share of the steps that fall to 0.
        floor: where the cosine ends.
    """
    rise, fall = round(warm_up * steps), round((1 - tail) * steps)
    if step < rise:
        return (step + 1) / rise
    if step >= fall:
        return floor * (steps - step) / (steps - fall)
    done = (step - rise) / (fall - rise)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def ramp(step: int, steps: int, share: float) -> float:
    """Linear from 0 at the first step to 1 after ``share`` of all steps, then 1 (AST, eq. 4)."""
    return min(1.0, step / (share * steps)) if share > 0 else 1.0
