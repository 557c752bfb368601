"""SparseGPT against optimal brain surgery done the slow way, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns.pattern import (
    NM,
    Budget,
    Pattern,
    Unstructured,
    check_mask,
    parse_pattern,
    proportional_counts,
    select,
)
from secateur.runs.errors import SecateurError
from secateur.solvers.scores import wanda_score
from secateur.solvers.sparsegpt import sparsegpt
from solvers.problems import make_problem, quadratic_error


def one_column_at_a_time(
    w_OI: Tensor, gram_II: Tensor, budget: Budget, damping: float, column_block: int
) -> tuple[Tensor, Tensor]:
    """Invert the matrix of the remaining columns anew for every column."""
    w_OI = w_OI.clone()
    width = w_OI.shape[1]
    live_I = gram_II.diagonal() > 0
    h_II = gram_II.clone()
    h_II.diagonal().add_(damping * gram_II.diagonal()[live_I].mean())
    mask_OI = torch.ones_like(w_OI, dtype=torch.bool)
    inverse = [torch.linalg.inv(h_II[j:, j:]) for j in range(width)]
    pattern = budget.pattern
    step = pattern.m if isinstance(pattern, NM) else column_block
    starts = list(range(0, width, step))
    for j in range(width):
        if j in starts:
            columns = slice(j, min(j + step, width))
            price_B = torch.stack([inverse[i][0, 0] for i in range(columns.start, columns.stop)])
            score_OB = (w_OI[:, columns].square() / price_B).where(live_I[columns], 0)
            if isinstance(pattern, NM):
                local = Budget.uniform(pattern, budget.rows, step)
            else:
                sizes = [min(step, width - start) for start in starts]
                zeros = [
                    proportional_counts(total, [rows * size for size in sizes])[j // step]
                    for rows, total in zip(budget.rows, budget.zeros, strict=True)
                ]
                local = Budget(pattern, budget.rows, tuple(zeros))
            mask_OI[:, columns] = select(score_OB, local, "linear")
        error_O = w_OI[:, j].where(~mask_OI[:, j], 0) / inverse[j][0, 0]
        w_OI[:, j:] -= error_O[:, None] * inverse[j][0]
        w_OI[:, j] = w_OI[:, j].where(mask_OI[:, j], 0)
    return w_OI, mask_OI


@pytest.mark.parametrize("pattern", ["0.5", "0.83", "0", "2:4", "1:3", "20:24"])
@pytest.mark.parametrize("column_block", [16, 20, 128])
@pytest.mark.parametrize("dead", [(), (0, 1, 30)])
def test_masks_and_weights_are_those_of_optimal_brain_surgery(
    pattern: str, column_block: int, dead: tuple[int, ...]
) -> None:
    w_OI, gram_II = make_problem(dead=dead)
    budget = Budget.uniform(parse_pattern(pattern), (9, 15), 48)
    solution = sparsegpt(w_OI, gram_II, budget, column_block=column_block)
    slow_OI, slow_mask_OI = one_column_at_a_time(w_OI, gram_II, budget, 0.01, column_block)
    assert torch.equal(solution.mask_OI, slow_mask_OI)
    torch.testing.assert_close(solution.w_OI, slow_OI, rtol=1e-9, atol=1e-9)
    assert not solution.notes


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_float32_is_as_good_as_float64(pattern: str) -> None:
    w_OI, gram_II = make_problem(rows=64, width=256, tokens=2000)
    budget = Budget.uniform(parse_pattern(pattern), [64], 256)
    exact = sparsegpt(w_OI, gram_II, budget)
    rounded = sparsegpt(w_OI.float(), gram_II.float(), budget)
    assert rounded.w_OI.dtype == torch.float32
    errors = [
        quadratic_error(solution.w_OI.double() - w_OI, gram_II).sum()
        for solution in (exact, rounded)
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)


@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    width=st.integers(1, 40),
    pattern=st.one_of(
        st.floats(0, 0.99).map(Unstructured),
        st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 5), (17, 20)]).map(lambda nm: NM(*nm)),
    ),
    column_block=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_zeros_are_exact_for_any_shape(
    rows: list[int], width: int, pattern: Pattern, column_block: int, seed: int
) -> None:
    if isinstance(pattern, NM):
        width *= pattern.m
    w_OI, gram_II = make_problem(sum(rows), width, tokens=10, seed=seed, dtype=torch.float32)
    budget = Budget.uniform(pattern, rows, width)
    solution = sparsegpt(w_OI, gram_II, budget, column_block=column_block)
    check_mask(solution.mask_OI, budget)
    assert torch.equal(solution.w_OI != 0, solution.mask_OI)
    assert solution.w_OI.isfinite().all()


def test_stacked_linears_do_not_see_each_other() -> None:
    w_OI, gram_II = make_problem()
    for pattern in (Unstructured(0.4), NM(2, 4)):
        alone = [Budget.uniform(pattern, [n], 48) for n in (7, 17)]
        budget = Budget(pattern, (7, 17), (*alone[0].zeros, *alone[1].zeros))
        stacked = sparsegpt(w_OI, gram_II, budget)
        parts = [
            sparsegpt(part, gram_II, one)
            for part, one in zip(w_OI.split((7, 17)), alone, strict=True)
        ]
        assert torch.equal(stacked.mask_OI, torch.cat([part.mask_OI for part in parts]))
        torch.testing.assert_close(stacked.w_OI, torch.cat([part.w_OI for part in parts]))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_beats_the_wanda_mask(pattern: str) -> None:
    w_OI, gram_II = make_problem(rows=32, width=128, tokens=1000)
    budget = Budget.uniform(parse_pattern(pattern), [32], 128)
    mask_OI = select(wanda_score(w_OI, gram_II.diagonal()), budget)
    wanda = quadratic_error(w_OI * mask_OI - w_OI, gram_II).sum()
    # Columns of very different scale: damping by their mean must not drown the small ones.
    solution = sparsegpt(w_OI, gram_II, budget, damping=1e-3)
    assert quadratic_error(solution.w_OI - w_OI, gram_II).sum() < wanda


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_gram_matrix_is_no_obstacle(damping: float) -> None:
    w_OI, gram_II = make_problem(tokens=12, dead=(3,), dtype=torch.float32)
    budget = Budget.uniform(Unstructured(0.5), [24], 48)
    solution = sparsegpt(w_OI, gram_II, budget, damping=damping)
    assert solution.w_OI.isfinite().all()
    assert bool(solution.notes) == (damping == 0)
    dense = quadratic_error(w_OI, gram_II).sum()
    assert quadratic_error(solution.w_OI - w_OI, gram_II).sum() < 0.05 * dense


def test_dead_columns_go_first_and_kept_ones_stay_as_they_were() -> None:
    dead = (1, 2, 3, 40, 41, 42)
    w_OI, gram_II = make_problem(dead=dead)
    columns = list(dead)
    solution = sparsegpt(w_OI, gram_II, Budget.uniform(Unstructured(0.5), [24], 48))
    assert not solution.mask_OI[:, columns].any()
    solution = sparsegpt(w_OI, gram_II, Budget.uniform(NM(3, 4), [24], 48))
    kept_OI = solution.mask_OI[:, columns]
    assert kept_OI.any()
    assert torch.equal(solution.w_OI[:, columns], w_OI[:, columns] * kept_OI)


def test_inputs_without_any_signal() -> None:
    w_OI, _ = make_problem(rows=4, width=8)
    budget = Budget.uniform(Unstructured(0.5), [4], 8)
    solution = sparsegpt(w_OI, torch.zeros(8, 8, dtype=torch.float64), budget)
    assert torch.equal(solution.w_OI, w_OI * solution.mask_OI)
    check_mask(solution.mask_OI, budget)


def test_arguments_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem()
    before = w_OI.clone(), gram_II.clone()
    sparsegpt(w_OI, gram_II, Budget.uniform(NM(2, 4), [24], 48))
    assert torch.equal(w_OI, before[0])
    assert torch.equal(gram_II, before[1])


def test_bad_input_is_refused() -> None:
    w_OI, gram_II = make_problem()
    budget = Budget.uniform(Unstructured(0.5), [24], 48)
    for bad in (w_OI.clone(), gram_II.clone()):
        bad[3, 4] = torch.nan
        weights, gram = (bad, gram_II) if bad.shape == w_OI.shape else (w_OI, bad)
        with pytest.raises(SecateurError, match="NaN"):
            sparsegpt(weights, gram, budget)
    with pytest.raises(SecateurError, match="rows"):
        sparsegpt(w_OI[:-1], gram_II, budget)
