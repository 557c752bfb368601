"""Patterns and budgets: exact counts, the lowest scores go, ties by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns.pattern import (
    NM,
    Budget,
    Scope,
    Unstructured,
    check_mask,
    check_width,
    keep_highest,
    lowest,
    parse_pattern,
    proportional_counts,
    select,
)
from secateur.runs.errors import SecateurError


def scores(rows: int, width: int, seed: int, levels: int | None = None) -> Tensor:
    """Random scores, drawn from a few levels if ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.rand(rows, width, generator=generator)
    return torch.randint(levels, (rows, width), generator=generator).float()


def pruned_by_sorting(score_N: Tensor, count: int) -> Tensor:
    """Brute force: positions in order of (score, position), the first `count` go."""
    values = score_N.tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    pruned_N = torch.zeros(len(values), dtype=torch.bool)
    pruned_N[order[:count]] = True
    return pruned_N


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.5", Unstructured(0.5)),
        ("0", Unstructured(0.0)),
        (" 50% ", Unstructured(0.5)),
        ("62.5%", Unstructured(0.625)),
        ("2:4", NM(2, 4)),
        ("4:4", NM(4, 4)),
        ("1:16", NM(1, 16)),
    ],
)
def test_patterns_are_read_and_written(text: str, pattern: Unstructured | NM) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@given(st.floats(0, 1, exclude_max=True))
def test_any_sparsity_survives_a_round_trip(sparsity: float) -> None:
    assert parse_pattern(str(Unstructured(sparsity))) == Unstructured(sparsity)


@pytest.mark.parametrize(
    "text",
    ["", "half", "1", "100%", "-0.1", "nan", "inf", "1.5", "2:", "2:4:8", "0:4", "5:4", "a:b"],
)
def test_bad_patterns_are_refused(text: str) -> None:
    with pytest.raises(SecateurError):
        parse_pattern(text)


def test_sparsity_of_n_of_m_counts_the_zeros() -> None:
    assert NM(2, 4).sparsity == 0.5
    assert NM(1, 4).sparsity == 0.75
    assert NM(8, 8).sparsity == 0


@given(st.data(), st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_proportional_counts_are_exact_and_close_to_each_share(
    data: st.DataObject, sizes: list[int]
) -> None:
    whole = sum(sizes)
    total = data.draw(st.integers(0, whole))
    counts = proportional_counts(total, sizes)
    assert sum(counts) == total
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count * whole - size * total) <= whole


def test_a_total_that_does_not_fit_is_refused() -> None:
    for total in (-1, 8):
        with pytest.raises(SecateurError):
            proportional_counts(total, [3, 4])


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 33),
    sparsity=st.floats(0, 0.999),
    levels=st.sampled_from([None, 1, 3]),
    scope=st.sampled_from(["row", "linear"]),
    seed=st.integers(0, 999),
)
def test_unstructured_selection_matches_sorting(
    rows: list[int], width: int, sparsity: float, levels: int | None, scope: Scope, seed: int
) -> None:
    budget = Budget.uniform(Unstructured(sparsity), rows, width)
    assert sum(budget.zeros) == round(sparsity * sum(rows) * width)
    score_OI = scores(sum(rows), width, seed, levels)
    mask_OI = select(score_OI, budget, scope)
    check_mask(mask_OI, budget)
    parts = zip(score_OI.split(rows), mask_OI.split(rows), budget.zeros, strict=True)
    for score, mask, zeros in parts:
        if scope == "linear":
            expected = pruned_by_sorting(score.flatten(), zeros).view(mask.shape)
        else:
            count = len(score)
            per_row = [(r + 1) * zeros // count - r * zeros // count for r in range(count)]
            expected = torch.stack(
                [pruned_by_sorting(s, n) for s, n in zip(score, per_row, strict=True)]
            )
        assert torch.equal(~mask, expected)


@given(
    group=st.integers(1, 24).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    levels=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 999),
)
def test_n_of_m_selection_matches_sorting_each_group(
    group: tuple[int, int], rows: int, groups: int, levels: int | None, seed: int
) -> None:
    n, m = group
    budget = Budget.uniform(NM(n, m), [rows], groups * m)
    score_OI = scores(rows, groups * m, seed, levels)
    mask_OI = select(score_OI, budget)
    check_mask(mask_OI, budget)
    for score_M, mask_M in zip(score_OI.view(-1, m), mask_OI.view(-1, m), strict=True):
        assert torch.equal(~mask_M, pruned_by_sorting(score_M, m - n))


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    levels=st.sampled_from([None, 2, 5]),
)
def test_rows_may_lose_as_many_as_they_are_told(
    counts: list[int], seed: int, levels: int | None
) -> None:
    score_OI = scores(len(counts), 12, seed, levels)
    budget = Budget(Unstructured(0.5), (len(counts),), (sum(counts),))
    mask_OI = select(score_OI, budget, "row", counts)
    check_mask(mask_OI, budget)
    for score_I, mask_I, count in zip(score_OI, mask_OI, counts, strict=True):
        assert torch.equal(~mask_I, pruned_by_sorting(score_I, count))


def test_groups_may_lie_along_any_dimension() -> None:
    score = scores(6, 8, 0)
    assert torch.equal(keep_highest(score, 2, dim=0), keep_highest(score.T, 2, dim=1).T)


def test_stacking_linears_changes_nothing() -> None:
    score_OI = scores(7, 12, 0, levels=4)
    for pattern in (Unstructured(0.37), NM(1, 3)):
        for scope in ("row", "linear"):
            alone = [Budget.uniform(pattern, [n], 12) for n in (3, 4)]
            zeros = (*alone[0].zeros, *alone[1].zeros)
            stacked = select(score_OI, Budget(pattern, (3, 4), zeros), scope)
            parts = [
                select(part, budget, scope)
                for part, budget in zip(score_OI.split((3, 4)), alone, strict=True)
            ]
            assert torch.equal(stacked, torch.cat(parts))


def test_infinite_scores_are_kept() -> None:
    score_OI = torch.zeros(2, 8)
    score_OI[:, :4] = torch.inf
    for pattern in (Unstructured(0.5), NM(4, 8)):
        mask_OI = select(score_OI, Budget.uniform(pattern, [2], 8))
        assert torch.equal(mask_OI, score_OI.isinf())


def test_float64_scores_are_told_apart_beyond_float32() -> None:
    score_OI = 1 + torch.arange(8, 0, -1, dtype=torch.float64)[None] * 1e-12
    mask_OI = select(score_OI, Budget.uniform(Unstructured(0.5), [1], 8))
    assert mask_OI[0].tolist() == [True] * 4 + [False] * 4


def test_scores_are_left_as_they_were() -> None:
    score_OI = scores(4, 8, 0)
    before = score_OI.clone()
    for pattern in (Unstructured(0.5), NM(2, 4)):
        for scope in ("row", "linear"):
            select(score_OI, Budget.uniform(pattern, [4], 8), scope)
    assert torch.equal(score_OI, before)


def test_a_nan_score_is_refused() -> None:
    score_OI = scores(4, 8, 0)
    score_OI[2, 3] = torch.nan
    for pattern in (Unstructured(0.5), NM(2, 4)):
        with pytest.raises(SecateurError, match="NaN"):
            select(score_OI, Budget.uniform(pattern, [4], 8))


def test_lowest_of_nothing() -> None:
    assert lowest(torch.empty(0, 5), []).shape == (0, 5)
    assert not lowest(torch.zeros(2, 5), [0, 0]).any()


def test_a_width_without_whole_groups_is_refused() -> None:
    check_width(Unstructured(0.5), 7)
    check_width(NM(2, 4), 8)
    with pytest.raises(SecateurError, match=r"2:4.*width is 7"):
        check_width(NM(2, 4), 7)
    with pytest.raises(SecateurError, match="width is 7"):
        Budget.uniform(NM(2, 4), [3], 7)


def test_budgets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(SecateurError):
        Budget(Unstructured(0.5), (2, 3), (4,))
    with pytest.raises(SecateurError):
        Budget(Unstructured(0.5), (2,), (-1,))
    score_OI = scores(2, 8, 0)
    for budget in (
        Budget(Unstructured(0.5), (3,), (4,)),
        Budget(Unstructured(0.5), (2,), (17,)),
        Budget(NM(2, 4), (2,), (7,)),
    ):
        with pytest.raises(SecateurError):
            select(score_OI, budget)


def test_a_mask_that_misses_its_budget_is_found() -> None:
    unstructured = Budget(Unstructured(0.5), (2,), (8,))
    mask_OI = select(scores(2, 8, 0), unstructured, "linear")
    mask_OI.view(-1)[mask_OI.view(-1).nonzero()[0]] = False
    with pytest.raises(SecateurError, match="9 zeros"):
        check_mask(mask_OI, unstructured)
    shifted = torch.tensor([[True, True, True, False, False, False, False, True]])
    with pytest.raises(SecateurError, match="2:4"):
        check_mask(shifted, Budget.uniform(NM(2, 4), [1], 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [2, 4, 8])
def test_groups_in_lanes_are_those_of_a_stable_sort(m: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m)
    # Few values, so that ties are common; -0.0 and infinities among them.
    values = torch.tensor([0.0, -0.0, 1.0, 2.0, 3.0, torch.inf], dtype=dtype)
    score = values[torch.randint(0, 6, (70, 1000, m), generator=generator)]
    for n in range(1, m + 1):
        order = score.argsort(dim=2, stable=True)
        expected = torch.ones_like(score, dtype=torch.bool).scatter_(2, order[:, :, : m - n], False)
        assert torch.equal(keep_highest(score, n, 2), expected)
        strided = score.transpose(0, 1)
        assert torch.equal(keep_highest(strided, n, 2), expected.transpose(0, 1))
