"""Exact integers from shares and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runs.errors import SecateurError
from secateur.solvers.counts import (
    BINS,
    bounded_counts,
    rank_histogram,
    score_histogram,
    threshold_counts,
)

parts = st.lists(
    st.tuples(
        st.integers(1, 10**9),  # size
        st.floats(0, 1),  # bound
        st.floats(0, 1),  # other bound
        st.floats(-1, 2),  # wanted
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=200)
@given(parts=parts, where=st.floats(0, 1))
def test_bounded_counts_meet_total_and_bounds(
    parts: list[tuple[int, float, float, float]], where: float
) -> None:
    sizes = [size for size, *_ in parts]
    low = [int(min(a, b) * size) for size, a, b, _ in parts]
    high = [int(max(a, b) * size) for size, a, b, _ in parts]
    wanted = [share * size for size, *_, share in parts]
    total = sum(low) + int(where * (sum(high) - sum(low)))
    counts = bounded_counts(wanted, sizes, total, low, high)
    assert sum(counts) == total
    assert all(a <= count <= b for a, count, b in zip(low, counts, high, strict=True))
    # Parts that no bound holds back are shifted by the same sparsity, to a weight or two.
    shifts = [
        ((count - 2 - want) / size, (count + 2 - want) / size)
        for count, want, size, a, b in zip(counts, wanted, sizes, low, high, strict=True)
        if a < count < b
    ]
    if shifts:
        assert max(first for first, _ in shifts) <= min(last for _, last in shifts)


def test_what_is_wanted_is_given_where_it_fits() -> None:
    assert bounded_counts([10, 30, 20], [100] * 3, 60, [0] * 3, [100] * 3) == [10, 30, 20]
    assert bounded_counts([-10, 60, 10], [100] * 3, 60, [0] * 3, [100] * 3) == [0, 55, 5]


@pytest.mark.parametrize(("total", "high"), [(31, [10, 20]), (4, [10, 20])])
def test_unreachable_totals_are_refused(total: int, high: list[int]) -> None:
    with pytest.raises(SecateurError, match="room for 5 to 30"):
        bounded_counts([1.0, 1.0], [10, 20], total, [5, 0], high)
    with pytest.raises(SecateurError, match="room for 5 to 30"):
        threshold_counts(np.zeros((2, BINS), np.int32), total, [5, 0], high)


def test_bins_have_the_order_of_the_scores_and_a_64th_of_their_width() -> None:
    score = torch.logspace(-44, 38, 2000, dtype=torch.float64).float().sort().values
    bins = [int(score_histogram(each[None]).nonzero()[0][0]) for each in score]
    assert bins == sorted(bins)
    edges = torch.arange(BINS, dtype=torch.int32).bitwise_left_shift(17).view(torch.float32)
    normal = edges[64 * 2 : 64 * 250].double()
    assert float((normal[1:] / normal[:-1]).max()) <= 1 + 1 / 64
    for extreme in (0.0, float("inf")):
        assert score_histogram(torch.full((3, 2), extreme)).sum() == 6


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.87, 1.0])
def test_threshold_counts_against_sorting_all_scores(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = [
        scale * torch.randn(rows, 40, generator=generator).square()
        for scale, rows in [(1.0, 60), (0.01, 30), (3.0, 50)]
    ]
    sizes = [score.numel() for score in scores]
    total = round(share * sum(sizes))
    ranked = torch.cat([score.double().flatten() for score in scores]).argsort()
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    expected = torch.bincount(owner[ranked[:total]], minlength=3).tolist()
    histograms = np.stack([score_histogram(score) for score in scores])
    counts = threshold_counts(histograms, total, [0] * 3, sizes)
    assert sum(counts) == total
    # Only the bin of the threshold itself is shared out in proportion.
    assert np.abs(np.subtract(counts, expected)).max() <= 0.005 * sum(sizes)


def test_even_rows_give_up_the_ranks_that_cost_least() -> None:
    generator = torch.Generator().manual_seed(4)
    # One sensitive row: with free rows the linear could spare nearly all of the others.
    uneven = torch.rand(50, 200, generator=generator)
    uneven[0] *= 30
    scores = [uneven, 2 * torch.rand(50, 200, generator=generator)]
    costs = [score.double().square().sort(dim=1).values for score in scores]

    def cost(first: int) -> float:
        ranks = [first, 200 - first]
        return sum(float(cost[:, :n].sum()) for cost, n in zip(costs, ranks, strict=True))

    best = min(range(201), key=cost)
    histograms = np.stack([rank_histogram(score) for score in scores])
    assert histograms.sum(axis=1).tolist() == [10_000, 10_000]
    counts = threshold_counts(histograms, 10_000, [0, 0], [10_000, 10_000])
    assert abs(counts[0] - 50 * best) <= 100
    free = np.stack([score_histogram(score) for score in scores])
    assert threshold_counts(free, 10_000, [0, 0], [10_000, 10_000])[0] > counts[0] + 1000


def test_threshold_moves_for_the_others_where_a_bound_holds() -> None:
    scores = [torch.rand(100, 10), 100 + torch.rand(100, 10)]
    histograms = np.stack([score_histogram(score) for score in scores])
    assert threshold_counts(histograms, 1000, [0, 0], [1000, 1000]) == [1000, 0]
    assert threshold_counts(histograms, 1000, [0, 0], [620, 1000]) == [620, 380]
    assert threshold_counts(histograms, 1000, [0, 450], [1000, 1000]) == [550, 450]
