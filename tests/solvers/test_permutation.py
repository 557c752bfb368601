"""Orders of columns: never worse than the given one, near the best, exact in what they claim."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from costs import LiveBytes
from secateur.patterns.pattern import NM
from secateur.solvers import permutation
from secateur.solvers.permutation import best_order, kept_score


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_by_hand(score_RC: Tensor, pattern: NM) -> float:
    """Sort every group of every row, in float64."""
    groups = score_RC.double().unflatten(1, (-1, pattern.m)).sort(2, descending=True).values
    return float(groups[:, :, : pattern.n].sum())


def partitions(columns: tuple[int, ...], m: int) -> list[tuple[int, ...]]:
    """Every way to cut columns into groups of m, order within and among groups apart."""
    if not columns:
        return [()]
    first, rest = columns[0], columns[1:]
    return [
        (first, *others, *more)
        for others in itertools.combinations(rest, m - 1)
        for more in partitions(tuple(c for c in rest if c not in others), m)
    ]


@settings(max_examples=60)
@given(
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 1), (4, 4)]),
    problems=st.integers(1, 3),
    rows=st.integers(1, 9),
    groups=st.integers(1, 7),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_an_order_holds_every_column_once_and_never_keeps_less(
    nm: tuple[int, int], problems: int, rows: int, groups: int, seed: int, ties: bool
) -> None:
    pattern = NM(*nm)
    score_BRC = torch.rand(problems, rows, groups * pattern.m, generator=draw(seed))
    if ties:
        score_BRC = (score_BRC * 3).round()
    found = best_order(score_BRC, pattern, draw(0))
    identity_C = torch.arange(score_BRC.shape[2])
    before = after = 0.0
    for score_RC, order_C in zip(score_BRC, found.order_BC, strict=True):
        assert torch.equal(order_C.sort().values, identity_C)
        old, new = kept_by_hand(score_RC, pattern), kept_by_hand(score_RC[:, order_C], pattern)
        # Each problem by itself is never worse; where it gains nothing it stays as it was.
        assert new > old or torch.equal(order_C, identity_C)
        before, after = before + old, after + new
    total = max(float(score_BRC.double().sum()), 1e-300)
    assert found.kept_before == pytest.approx(before / total, rel=1e-6)
    assert found.kept == pytest.approx(after / total, rel=1e-6)


@pytest.mark.parametrize(("pattern", "columns"), [(NM(2, 4), 8), (NM(1, 2), 8), (NM(1, 3), 9)])
def test_orders_come_near_the_best_of_all(pattern: NM, columns: int) -> None:
    every = torch.tensor(partitions(tuple(range(columns)), pattern.m))
    gained = possible = 0.0
    for seed in range(20):
        score_RC = torch.rand(5, columns, generator=draw(seed)).square()
        best = float(kept_score(score_RC[:, every].transpose(0, 1), pattern).max())
        before = kept_by_hand(score_RC, pattern)
        order_C = best_order(score_RC[None], pattern, draw(0)).order_BC[0]
        found = kept_by_hand(score_RC[:, order_C], pattern)
        assert found <= best * (1 + 1e-6)
        gained, possible = gained + found - before, possible + best - before
    assert gained > 0.8 * possible


def test_large_columns_that_compete_are_spread() -> None:
    score_BRC = torch.rand(1, 6, 16, generator=draw(0))
    score_BRC[:, :, :8] += 10
    found = best_order(score_BRC, NM(2, 4), draw(0))
    assert torch.equal((found.order_BC.view(4, 4) < 8).sum(1), torch.full((4,), 2))
    assert found.kept == pytest.approx(float(score_BRC[:, :, :8].sum() / score_BRC.sum()))
    assert found.kept_before < 0.6 < found.kept


def test_what_competes_row_by_row_is_spread_too() -> None:
    # All columns have the same total, but four at a time are large in the same row.
    score_RC = torch.eye(4).repeat_interleave(4, 1)
    assert best_order(score_RC[None], NM(1, 4), draw(0)).kept == 1
    assert kept_by_hand(score_RC, NM(1, 4)) == 4


def test_parts_and_chosen_rows_still_gain_and_never_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_PARTNERS", 3)
    monkeypatch.setattr(permutation, "_ROWS", 8)
    for seed in range(5):
        # Five groups: one has to sit out of each round of two parts.
        score_BRC = torch.rand(2, 30, 20, generator=draw(seed)) * torch.rand(20).exp()
        found = best_order(score_BRC, NM(2, 4), draw(0))
        assert found.kept >= found.kept_before
    scale_C = torch.rand(400, generator=draw(1)).mul(3).exp()
    found = best_order(torch.rand(1, 30, 400, generator=draw(2)) * scale_C, NM(2, 4), draw(0))
    assert found.kept > found.kept_before + 0.03


def test_the_same_seed_gives_the_same_order() -> None:
    score_BRC = torch.rand(3, 20, 64, generator=draw(0))
    first, second = (best_order(score_BRC, NM(2, 4), draw(7)).order_BC for _ in range(2))
    assert torch.equal(first, second)


def test_scores_of_nothing_stay_as_they_are() -> None:
    found = best_order(torch.zeros(1, 4, 8), NM(2, 4), draw(0))
    assert found.order_BC.tolist() == [list(range(8))]
    assert found.kept == found.kept_before == 0


def test_memory_grows_with_the_scores_and_not_with_pairs_of_columns() -> None:
    score_BRC = torch.rand(1, 32, 2048, generator=draw(0))
    with LiveBytes() as memory:
        best_order(score_BRC, NM(2, 4), draw(0))
    assert memory.peak < 8 * score_BRC.nbytes
