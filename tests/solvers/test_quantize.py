"""Error feedback against GPTQ done the slow way, and what descent and refitted scales promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns.pattern import Budget, parse_pattern, select
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import Grid, GridOptions, make_grid, round_to_grid
from secateur.solvers.quantize import descend, error_feedback, quantize, refit_scales
from secateur.solvers.refit import refit
from solvers.problems import make_problem, quadratic_error

WIDTH = 48
DAMPING = 0.01


def pruned_problem(
    pattern: str = "0.5", seed: int = 0, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights refitted on a mask, the mask, and the Gram matrix."""
    w_OI, gram_II = make_problem(seed=seed, dead=dead)
    score_OI = w_OI.abs() * gram_II.diagonal().sqrt()
    mask_OI = select(score_OI, Budget.uniform(parse_pattern(pattern), (len(w_OI),), WIDTH))
    return refit(w_OI, mask_OI, gram_II), mask_OI, gram_II


def ridge(gram_II: Tensor) -> Tensor:
    live_I = gram_II.diagonal() > 0
    mean = gram_II.diagonal()[live_I].mean()
    return gram_II + torch.diag(mean * (DAMPING + (~live_I).double()))


def grid_of(w_OI: Tensor, mask_OI: Tensor, options: GridOptions) -> Grid:
    return make_grid(w_OI, mask_OI, options, stored=torch.float64)


def one_column_at_a_time(w_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, grid: Grid) -> Tensor:
    """The paper's loop: the inverse of what remains, anew for every column."""
    h_II = ridge(gram_II)
    order = gram_II.diagonal().argsort(descending=True, stable=True).tolist()
    w_OI = w_OI.clone()
    scale_OI = grid.scales(WIDTH)
    lowest_OI, highest_OI = grid.bounds(WIDTH)
    level_OI = torch.zeros_like(w_OI)
    for position, j in enumerate(order):
        rest = order[position:]
        inverse = torch.linalg.inv(h_II[rest][:, rest])
        level = (w_OI[:, j] / scale_OI[:, j]).round()
        level = level.clamp(lowest_OI[:, j], highest_OI[:, j]) * mask_OI[:, j]
        level_OI[:, j] = level
        error = (w_OI[:, j] - level * scale_OI[:, j]) / inverse[0, 0]
        w_OI[:, rest] -= error[:, None] * inverse[0]
    return level_OI


@pytest.mark.parametrize("group", [0, 12])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dead", [(), (0, 1, 30)])
def test_levels_are_those_of_the_slow_way(
    group: int, symmetric: bool, dead: tuple[int, ...]
) -> None:
    w_OI, mask_OI, gram_II = pruned_problem(dead=dead)
    grid = grid_of(w_OI, mask_OI, GridOptions(4, group, symmetric))
    level_OI, notes = error_feedback(w_OI, mask_OI, gram_II, grid, DAMPING)
    assert torch.equal(level_OI, one_column_at_a_time(w_OI, mask_OI, gram_II, grid))
    assert not notes


@given(
    bits=st.sampled_from([3, 4, 8]),
    group=st.sampled_from([0, 4, 16, 48]),
    symmetric=st.booleans(),
    pattern=st.sampled_from(["0", "0.5", "0.83", "2:4"]),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_zeros_stay_and_no_row_ends_worse_than_rounded(
    bits: int, group: int, symmetric: bool, pattern: str, stored: torch.dtype, seed: int
) -> None:
    w_OI, mask_OI, gram_II = pruned_problem(pattern, seed)
    options = GridOptions(bits, group, symmetric)
    grid = make_grid(w_OI, mask_OI, options, stored=stored)
    solution = quantize(w_OI, mask_OI, gram_II, grid, damping=DAMPING, stored=stored)
    assert not solution.w_OI[~mask_OI].any()
    assert not solution.level_OI[~mask_OI].any()
    lowest_OI, highest_OI = solution.grid.bounds(WIDTH)
    assert ((solution.level_OI >= lowest_OI) & (solution.level_OI <= highest_OI)).all()
    assert torch.equal(solution.grid.scale_OG.to(stored).double(), solution.grid.scale_OG)
    rounded_OI = round_to_grid(w_OI, mask_OI, grid).w_OI
    h_II = ridge(gram_II)
    loss_O = quadratic_error(solution.w_OI - w_OI, h_II)
    assert (loss_O <= quadratic_error(rounded_OI - w_OI, h_II) * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_feedback_alone_loses_less_than_rounding_and_descent_less_still(bits: int) -> None:
    w_OI, mask_OI, gram_II = pruned_problem("0.5")
    h_II = ridge(gram_II)
    grid = grid_of(w_OI, mask_OI, GridOptions(bits, 12, True))

    def loss(level_OI: Tensor) -> float:
        return float(quadratic_error(grid.values(level_OI) - w_OI, h_II).sum())

    rounded = round_to_grid(w_OI, mask_OI, grid).level_OI
    fed, _ = error_feedback(w_OI, mask_OI, gram_II, grid, DAMPING)
    lower = descend(w_OI, fed, mask_OI, h_II, grid)
    assert loss(lower) < loss(fed) < loss(rounded)


def test_descent_is_the_best_level_for_one_column_after_the_other() -> None:
    w_OI, mask_OI, gram_II = pruned_problem("0.5")
    h_II = ridge(gram_II)
    grid = grid_of(w_OI, mask_OI, GridOptions(3, 16, False))
    start_OI = round_to_grid(w_OI, mask_OI, grid).level_OI
    slow_OI = start_OI.clone()
    lowest_OI, highest_OI = grid.bounds(WIDTH)
    for row in range(len(w_OI)):
        for j in range(WIDTH):
            if not mask_OI[row, j]:
                continue
            best = None
            for level in range(int(lowest_OI[row, j]), int(highest_OI[row, j]) + 1):
                tried_1I = slow_OI[row : row + 1].clone()
                tried_1I[0, j] = level
                delta_1I = grid.rows(slice(row, row + 1)).values(tried_1I) - w_OI[row]
                loss = float(quadratic_error(delta_1I, h_II))
                if best is None or loss < best[0]:
                    best = (loss, level)
            assert best is not None
            slow_OI[row, j] = best[1]
    assert torch.equal(descend(w_OI, start_OI, mask_OI, h_II, grid), slow_OI)


@pytest.mark.parametrize("group", [0, 12, 16])
def test_refitted_scales_are_the_least_squares_solution(group: int) -> None:
    w_OI, mask_OI, gram_II = pruned_problem("0.5")
    mask_OI[0, :16] = False
    w_OI = w_OI * mask_OI
    h_II = ridge(gram_II)
    grid = grid_of(w_OI, mask_OI, GridOptions(4, group, True))
    level_OI = round_to_grid(w_OI, mask_OI, grid).level_OI
    found_OG = refit_scales(w_OI, level_OI, h_II, grid)
    groups = found_OG.shape[1]
    root_II = torch.linalg.cholesky(h_II)
    for row in range(len(w_OI)):
        u_GI = torch.block_diag(*level_OI[row].view(groups, -1))
        used_G = u_GI.any(1)
        best = torch.linalg.lstsq((u_GI[used_G] @ root_II).T, w_OI[row] @ root_II).solution
        torch.testing.assert_close(found_OG[row, used_G], best, rtol=1e-8, atol=1e-10)
        assert torch.equal(found_OG[row, ~used_G], grid.scale_OG[row, ~used_G])


def test_refitted_scales_lower_the_loss() -> None:
    w_OI, mask_OI, gram_II = pruned_problem("0.5")
    h_II = ridge(gram_II)
    grid = grid_of(w_OI, mask_OI, GridOptions(3, 12, False))
    rounded = round_to_grid(w_OI, mask_OI, grid)
    fitted = replace(grid, scale_OG=refit_scales(w_OI, rounded.level_OI, h_II, grid))
    before_O = quadratic_error(rounded.w_OI - w_OI, h_II)
    after_O = quadratic_error(fitted.values(rounded.level_OI) - w_OI, h_II)
    assert (after_O < before_O).all()


def test_float32_is_as_good_as_float64() -> None:
    w_OI, mask_OI, gram_II = pruned_problem("0.5")
    losses = []
    for dtype in (torch.float32, torch.float64):
        grid = make_grid(w_OI.to(dtype), mask_OI, GridOptions(4, 12, True))
        solution = quantize(w_OI.to(dtype), mask_OI, gram_II.to(dtype), grid)
        losses.append(float(quadratic_error(solution.w_OI.double() - w_OI, gram_II).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_singular_gram_matrix_is_survived_and_infinite_weights_are_not() -> None:
    w_OI, mask_OI, _ = pruned_problem()
    x_NI = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = grid_of(w_OI, mask_OI, GridOptions(4, 12, True))
    solution = quantize(w_OI, mask_OI, x_NI.T @ x_NI / 3, grid, damping=1e-12)
    assert torch.isfinite(solution.w_OI).all()
    w_OI[0, 0] = torch.inf
    with pytest.raises(SecateurError, match="the weights hold NaN or infinite"):
        quantize(w_OI, mask_OI, x_NI.T @ x_NI, grid)
