from __future__ import annotations

import pytest
import torch

from secateur.evaluation import intervals
from secateur.evaluation.intervals import percentile_interval, resampled_means
from secateur.runs.errors import SecateurError


@pytest.fixture(scope="module")
def values_KW() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 25, generator=generator, dtype=torch.float64)


def test_means_of_drawn_windows_as_in_a_loop(values_KW: torch.Tensor) -> None:
    means_KR = resampled_means(values_KW, resamples=50, seed=7)
    generator = torch.Generator().manual_seed(7)
    drawn_RW = torch.randint(25, (50, 25), generator=generator).tolist()
    for resample, windows in enumerate(drawn_RW):
        for row in range(2):
            mean = sum(float(values_KW[row, window]) for window in windows) / 25
            assert float(means_KR[row, resample]) == pytest.approx(mean)


def test_draws_do_not_depend_on_how_many_fit_at_once(
    values_KW: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = resampled_means(values_KW, resamples=33)
    monkeypatch.setattr(intervals, "_NUMBERS", 2 * 25 * 4)
    assert torch.equal(resampled_means(values_KW, resamples=33), at_once)


def test_rows_are_resampled_in_pairs(values_KW: torch.Tensor) -> None:
    shifted = torch.stack([values_KW[0], values_KW[0] + 0.25])
    model_R, dense_R = resampled_means(shifted, resamples=100)
    torch.testing.assert_close(dense_R - model_R, torch.full_like(model_R, 0.25))


def test_interval_ends_are_quantiles() -> None:
    assert percentile_interval(torch.arange(1001.0)) == (25.0, 975.0)


def test_intervals_cover_the_true_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        sample = torch.randn(1, 60, generator=generator).exp()
        low, high = percentile_interval(resampled_means(sample, resamples=500, seed=trial)[0])
        covered += low < torch.tensor(0.5).exp() < high
    assert 0.88 < covered / 200 <= 0.99


def test_no_resamples_give_no_interval(values_KW: torch.Tensor) -> None:
    with pytest.raises(SecateurError, match="0 resamples"):
        resampled_means(values_KW, resamples=0)
