"""The schedule's points are those of the GPT-2 recipe."""

from __future__ import annotations

import pytest

from secateur.solvers.schedule import ramp, warm_up_cosine

STEPS = 40_000


def learning_rate_share(step: int, steps: int) -> float:
    rise, fall = round(0.05 * steps), round(0.95 * steps)
    return warm_up_cosine(step, steps, rise=rise, fall=fall, floor=0.1)


def test_learning_rate_passes_through_the_published_points() -> None:
    share = [learning_rate_share(step, STEPS) for step in range(STEPS)]
    assert share[0] == pytest.approx(1 / 2000)
    assert share[1999] == 1
    assert max(share) == 1
    assert share[38_000] == pytest.approx(0.1)
    assert share[39_000] == pytest.approx(0.05)
    assert 0 < share[-1] < 1e-4
    falling = share[1999:]
    assert falling == sorted(falling, reverse=True)


def test_ramp_rises_in_a_straight_line_and_stays() -> None:
    assert ramp(0, STEPS, 0.25) == 0
    assert ramp(2500, STEPS, 0.25) == 0.25
    assert ramp(10_000, STEPS, 0.25) == ramp(39_999, STEPS, 0.25) == 1
    assert ramp(0, STEPS, 0.0) == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_short_runs_have_a_rate_at_every_step(steps: int) -> None:
    assert all(0 < learning_rate_share(step, steps) <= 1 for step in range(steps))
