"""Following the margin, against a loop."""

from __future__ import annotations

import math

import torch

from secateur.solvers.margin import follow_margin


def test_each_row_follows_the_mean_slope_at_its_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    cost_OI = torch.rand(6, 20, generator=generator, dtype=torch.float64) * 4
    slope_OI = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    cost_OI[5] = 100  # A row without a margin stays as it is.
    expected_OI = cost_OI.clone()
    for row in range(6):
        margin = [s for c, s in zip(cost_OI[row], slope_OI[row], strict=True) if 2 / 1.5 < c < 3]
        slope = sum(margin) / len(margin) if margin else 0.0
        expected_OI[row] *= math.exp(0.3 * max(-1.0, min(1.0, float(slope) / 2)))
    follow_margin(cost_OI, slope_OI, threshold=2.0, pull=0.3)
    torch.testing.assert_close(cost_OI, expected_OI)


def test_a_row_whose_weights_are_missed_becomes_dearer_and_another_cheaper() -> None:
    cost_OI = torch.full((2, 8), 1.0)
    slope_OI = torch.tensor([[0.5] * 8, [-0.5] * 8])
    follow_margin(cost_OI, slope_OI, threshold=1.0, pull=0.5)
    assert (cost_OI[0] > 1).all()
    assert (cost_OI[1] < 1).all()
