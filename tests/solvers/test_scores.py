"""Scores against their definitions."""

from __future__ import annotations

import torch

from secateur.solvers.scores import magnitude_score, wanda_score


def test_wanda_is_weight_times_root_mean_square_of_the_input() -> None:
    x_NI = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]])
    w_OI = torch.tensor([[1.0, -5.0, -2.0]])
    score_OI = wanda_score(w_OI, (x_NI.T @ x_NI / 2).diagonal())
    torch.testing.assert_close(score_OI, torch.tensor([[12.5**0.5, 0.0, 2.0]]))
    assert w_OI.tolist() == [[1.0, -5.0, -2.0]]


def test_magnitude() -> None:
    assert magnitude_score(torch.tensor([[-2.0, 1.0, 0.0]])).tolist() == [[2.0, 1.0, 0.0]]
