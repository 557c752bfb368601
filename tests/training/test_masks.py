"""Masks that follow scores, within what each row keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.patterns.pattern import NM, Pattern, Unstructured
from secateur.runs.errors import SecateurError
from secateur.training.masks import (
    RowBudget,
    choose_mask,
    flips,
    magnitude,
    renew_mask,
    sensitivity,
)


def weights(rows: int = 6, columns: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000))
def test_two_largest_of_every_four_are_kept(seed: int) -> None:
    w_OI = weights(seed=seed)
    mask_OI = choose_mask(magnitude(w_OI), RowBudget.even(NM(2, 4), 6, 48))
    for group, kept in zip(w_OI.view(-1, 4), mask_OI.view(-1, 4), strict=True):
        largest = set(group.abs().argsort(descending=True)[:2].tolist())
        assert set(kept.nonzero().flatten().tolist()) == largest


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.4)])
def test_rows_never_trade_zeros(pattern: Pattern) -> None:
    zeros = 48 if isinstance(pattern, NM) else 38
    rows = RowBudget.even(pattern, 6, zeros)
    before = choose_mask(weights(seed=1).abs(), rows)
    skewed = weights(seed=2).abs() * torch.arange(1, 7)[:, None]
    after = choose_mask(skewed, rows, before, 0.1)
    assert int((~after).sum()) == zeros
    assert torch.equal(before.sum(1), after.sum(1))
    again = RowBudget.of_mask(pattern, before)
    assert torch.equal(choose_mask(skewed, again, before, 0.1), after)


def test_ties_and_zeros_have_one_answer() -> None:
    rows = RowBudget.even(NM(2, 4), 2, 4)
    expected = torch.tensor([[False, False, True, True]] * 2)
    for value in (0.0, 3.0):
        assert torch.equal(choose_mask(torch.full((2, 4), value), rows), expected)


def test_nan_is_refused() -> None:
    score_OI = torch.ones(2, 4)
    score_OI[1, 2] = torch.nan
    with pytest.raises(SecateurError, match="NaN"):
        choose_mask(score_OI, RowBudget.even(NM(2, 4), 2, 4))


def test_mask_of_another_pattern_is_refused() -> None:
    with pytest.raises(SecateurError, match="pattern 2:4"):
        RowBudget.of_mask(NM(2, 4), torch.tensor([[True, True, True, False]]))


def test_hysteresis_keeps_what_is_nearly_as_good() -> None:
    rows = RowBudget.even(NM(2, 4), 1, 2)
    kept = torch.tensor([[True, True, False, False]])
    score = torch.tensor([[1.0, 1.0, 1.05, 1.2]])
    assert choose_mask(score, rows, kept).tolist() == [[False, False, True, True]]
    swapped = choose_mask(score, rows, kept, hysteresis=0.1)
    assert swapped.tolist() == [[False, True, False, True]]
    assert torch.equal(choose_mask(score, rows, kept, hysteresis=0.3), kept)
    assert torch.equal(choose_mask(torch.zeros(1, 4), rows, kept, hysteresis=0.1), kept)


def test_flips_come_in_pairs_within_a_group() -> None:
    rows = RowBudget.even(NM(2, 4), 6, 48)
    first, second = (choose_mask(weights(seed=seed).abs(), rows) for seed in (1, 2))
    assert int(flips(first, first)) == 0
    assert int(flips(first, second)) == int((first != second).sum()) > 0
    assert bool(((first != second).view(-1, 4).sum(1) % 2 == 0).all())


def test_sensitivity_is_the_root_of_the_expected_change() -> None:
    w_OI, v_OI = weights(), weights(seed=3).square()
    torch.testing.assert_close(sensitivity(w_OI, v_OI).square(), w_OI.square() * v_OI)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), NM(2, 5), Unstructured(0.37)])
@pytest.mark.parametrize("hysteresis", [0.0, 0.2])
def test_mask_renewed_in_parts_is_that_of_the_whole(pattern: Pattern, hysteresis: float) -> None:
    # Of so wide rows a few fill what is done at a time.
    shape = (7, 40_000)
    zeros = round(pattern.sparsity * 7 * 40_000)
    rows = RowBudget.even(pattern, 7, zeros)
    before = choose_mask(weights(*shape, seed=1).abs(), rows)
    score_OI = weights(*shape, seed=2).abs()
    expected = choose_mask(score_OI, rows, before, hysteresis)
    mask_OI = before.clone()
    changed = renew_mask(mask_OI, rows, lambda part: score_OI[part], hysteresis)
    assert torch.equal(mask_OI, expected)
    assert int(changed) == int(flips(before, expected)) > 0
