"""Scores of weights and of units against their definitions."""

from __future__ import annotations

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.solvers.ridge import cut_loss
from secateur.solvers.scores import (
    fluctuation_columns,
    magnitude_score,
    unit_means,
    wanda_columns,
    wanda_score,
)
from solvers.problems import make_problem


def test_wanda_is_weight_times_root_mean_square_of_the_input() -> None:
    x_NI = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]])
    w_OI = torch.tensor([[1.0, -5.0, -2.0]])
    score_OI = wanda_score(w_OI, (x_NI.T @ x_NI / 2).diagonal())
    torch.testing.assert_close(score_OI, torch.tensor([[12.5**0.5, 0.0, 2.0]]))
    assert w_OI.tolist() == [[1.0, -5.0, -2.0]]


def test_magnitude() -> None:
    assert magnitude_score(torch.tensor([[-2.0, 1.0, 0.0]])).tolist() == [[2.0, 1.0, 0.0]]


def test_wanda_is_mean_magnitude_times_input_norm() -> None:
    w_OI = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert wanda_columns(w_OI, torch.tensor([4.0, 9.0])).tolist() == [4.0, 3.0]


def test_fluctuation_is_the_loss_of_a_column_beyond_its_mean() -> None:
    w_OI, gram_II = make_problem(width=6)
    mean_I = torch.linspace(-1, 1, 6, dtype=torch.float64) * gram_II.diagonal().sqrt()
    centred_II = gram_II - mean_I.outer(mean_I)
    score_I = fluctuation_columns(w_OI, centred_II.diagonal())
    for column in range(6):
        kept_K = torch.tensor([other for other in range(6) if other != column])
        loss = cut_loss(w_OI, w_OI[:, kept_K], kept_K, centred_II)
        torch.testing.assert_close(score_I[column], loss)


def test_a_unit_scores_the_mean_of_its_columns() -> None:
    score_I = torch.tensor([1.0, 3.0, 5.0, 9.0])
    assert unit_means(score_I, 2).tolist() == [2.0, 7.0]
    assert unit_means(score_I, 1).tolist() == score_I.tolist()
    with pytest.raises(SecateurError, match="units of 3"):
        unit_means(score_I, 3)


def test_weights_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem(width=6)
    before_OI = w_OI.clone()
    wanda_columns(w_OI, gram_II.diagonal())
    fluctuation_columns(w_OI, gram_II.diagonal())
    assert torch.equal(w_OI, before_OI)
