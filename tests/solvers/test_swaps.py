"""Swaps against errors computed afresh for every exchange."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.patterns.pattern import (
    NM,
    Budget,
    Pattern,
    Unstructured,
    check_mask,
    parse_pattern,
    select,
)
from secateur.runs.errors import SecateurError
from secateur.solvers.scores import wanda_score
from secateur.solvers.swaps import swap_weights
from solvers.problems import make_problem, predicted_change, quadratic_error

PATTERNS = ["0.5", "0.7", "2:4", "4:8", "1:4"]


def start(
    pattern: Pattern, rows: int = 6, width: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A linear with Wanda's mask and its error: weights, mask, gradient, Gram, curvature."""
    w_OI, gram_II = make_problem(rows, width, dtype=dtype)
    budget = Budget.uniform(pattern, [rows], width)
    mask_OI = select(wanda_score(w_OI, gram_II.diagonal()), budget)
    curvature_O = torch.linspace(0.5, 3, rows, dtype=dtype)
    gradient_OI = curvature_O[:, None] * ((w_OI * mask_OI - w_OI) @ gram_II)
    return w_OI, mask_OI, gradient_OI, gram_II, curvature_O


def error(w_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, curvature_O: Tensor) -> Tensor:
    return 0.5 * curvature_O * quadratic_error(w_OI * ~mask_OI, gram_II)


def swaps_of(mask_I: Tensor, pattern: Pattern) -> list[tuple[int, int]]:
    """Every (kept, removed) that may be exchanged in a row."""
    return [
        (p, q)
        for p in mask_I.nonzero()[:, 0].tolist()
        for q in (~mask_I).nonzero()[:, 0].tolist()
        if not isinstance(pattern, NM) or p // pattern.m == q // pattern.m
    ]


def exchanged(mask_I: Tensor, p: int, q: int) -> Tensor:
    mask_I = mask_I.clone()
    mask_I[p], mask_I[q] = False, True
    return mask_I


@pytest.mark.parametrize("text", PATTERNS)
def test_the_first_swap_is_the_best_of_all_by_brute_force(text: str) -> None:
    pattern = parse_pattern(text)
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern)
    before_O = error(w_OI, mask_OI, gram_II, curvature_O)
    for row in range(len(w_OI)):
        changes = {}
        for p, q in swaps_of(mask_OI[row], pattern):
            mask_1I = exchanged(mask_OI[row], p, q)[None]
            after = error(w_OI[row, None], mask_1I, gram_II, curvature_O[row, None])
            changes[p, q] = float(after - before_O[row])
            delta_1I = w_OI[row] * (mask_1I.double() - mask_OI[row].double())
            predicted = predicted_change(
                delta_1I, gradient_OI[row, None], gram_II, curvature_O[row, None]
            )
            assert float(predicted) == pytest.approx(changes[p, q], rel=1e-9, abs=1e-9)
        found_OI, change_O = swap_weights(
            w_OI[row, None],
            mask_OI[row, None],
            gradient_OI[row, None],
            gram_II,
            curvature_O[row, None],
            pattern,
            rounds=1,
            shortlist=16,
        )
        # Of several exchanges in the round the first is the best alone.
        assert float(change_O) <= min(0, *changes.values()) + 1e-9
        if min(changes.values()) > 0:
            assert torch.equal(found_OI[0], mask_OI[row])


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shortlist", [1, 3, 64])
def test_predicted_change_of_all_rounds_is_that_of_the_error(text: str, shortlist: int) -> None:
    pattern = parse_pattern(text)
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern, rows=20, width=48)
    before_O = error(w_OI, mask_OI, gram_II, curvature_O)
    last_O = torch.zeros_like(before_O)
    for rounds in (1, 2, 5, 100):
        found_OI, change_O = swap_weights(
            w_OI,
            mask_OI,
            gradient_OI,
            gram_II,
            curvature_O,
            pattern,
            rounds=rounds,
            shortlist=shortlist,
            tolerance=0,
        )
        check_mask(found_OI, Budget(pattern, (20,), (int((~mask_OI).sum()),)))
        assert torch.equal(found_OI.sum(1), mask_OI.sum(1))
        after_O = error(w_OI, found_OI, gram_II, curvature_O)
        torch.testing.assert_close(change_O, after_O - before_O, rtol=1e-9, atol=1e-9)
        assert (change_O <= last_O + 1e-12).all()
        last_O = change_O
    assert float(last_O.sum()) < -0.05 * float(before_O.sum())


@pytest.mark.parametrize("text", PATTERNS)
def test_at_the_end_no_swap_of_any_row_helps(text: str) -> None:
    pattern = parse_pattern(text)
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern)
    found_OI, _ = swap_weights(
        w_OI,
        mask_OI,
        gradient_OI,
        gram_II,
        curvature_O,
        pattern,
        rounds=1000,
        shortlist=16,
        tolerance=0,
    )
    after_O = error(w_OI, found_OI, gram_II, curvature_O)
    for row in range(len(w_OI)):
        for p, q in swaps_of(found_OI[row], pattern):
            mask_1I = exchanged(found_OI[row], p, q)[None]
            there = error(w_OI[row, None], mask_1I, gram_II, curvature_O[row, None])
            assert float(there) >= float(after_O[row]) * (1 - 1e-9)


@pytest.mark.parametrize("text", PATTERNS)
def test_any_gradient_and_any_kept_weights_will_do(text: str) -> None:
    """The model is that of a block: gradients of other errors too, and weights already updated."""
    pattern = parse_pattern(text)
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern, rows=12, width=32)
    generator = torch.Generator().manual_seed(1)
    noise_OI = torch.randn(w_OI.shape, generator=generator, dtype=torch.float64)
    gradient_OI = gradient_OI + 0.1 * gradient_OI.std() * noise_OI
    value_OI = torch.where(mask_OI, w_OI * 1.1, w_OI)
    found_OI, change_O = swap_weights(
        value_OI, mask_OI, gradient_OI, gram_II, curvature_O, pattern, tolerance=0, rounds=100
    )
    delta_OI = value_OI * (found_OI.double() - mask_OI.double())
    expected_O = predicted_change(delta_OI, gradient_OI, gram_II, curvature_O)
    torch.testing.assert_close(change_O, expected_O, rtol=1e-9, atol=1e-9)
    assert (change_O < 0).any()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_float32_finds_masks_as_good_as_float64(pattern: Pattern) -> None:
    errors = []
    for dtype in (torch.float32, torch.float64):
        w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern, 40, 128, dtype)
        found_OI, _ = swap_weights(w_OI, mask_OI, gradient_OI, gram_II, curvature_O, pattern)
        errors.append(float(error(w_OI, found_OI, gram_II, curvature_O).sum()))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_nothing_to_gain_changes_nothing(pattern: Pattern) -> None:
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern)
    for gradient, gram, mask in (
        (torch.zeros_like(gradient_OI), gram_II, mask_OI),
        (torch.zeros_like(gradient_OI), torch.zeros_like(gram_II), mask_OI),
    ):
        found_OI, change_O = swap_weights(w_OI, mask, gradient, gram, curvature_O, pattern)
        assert torch.equal(found_OI, mask)
        assert not change_O.any()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_weights_that_are_zero_count_like_any_other(pattern: Pattern) -> None:
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(pattern, rows=20, width=48)
    w_OI = w_OI.masked_fill(mask_OI, 0)
    gradient_OI = -curvature_O[:, None] * (w_OI @ gram_II)
    found_OI, change_O = swap_weights(w_OI, mask_OI, gradient_OI, gram_II, curvature_O, pattern)
    check_mask(found_OI, Budget(pattern, (20,), (int((~mask_OI).sum()),)))
    assert torch.equal(found_OI.sum(1), mask_OI.sum(1))
    assert (change_O < 0).all()


@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_are_full_or_empty_stay(kept: bool) -> None:
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(Unstructured(0.5))
    mask_OI[1] = kept
    found_OI, change_O = swap_weights(
        w_OI, mask_OI, gradient_OI, gram_II, curvature_O, Unstructured(0.5)
    )
    assert torch.equal(found_OI[1], mask_OI[1])
    assert change_O.isfinite().all()


def test_numbers_that_are_none_are_refused() -> None:
    w_OI, mask_OI, gradient_OI, gram_II, curvature_O = start(NM(2, 4))
    gradient_OI[0, 0] = torch.nan
    with pytest.raises(SecateurError, match="gradient"):
        swap_weights(w_OI, mask_OI, gradient_OI, gram_II, curvature_O, NM(2, 4))
