"""Grids: zeros stay zeros, ranges ignore removed weights, strengths have the right gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.solvers.grids import Clipping, GridOptions, make_grid, search_clipping

ROWS, WIDTH = 6, 24
GROUPS = (0, 1, 4, 12, 24)


def problem(seed: int = 0, shift: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) + shift
    return w_OI, torch.rand(ROWS, WIDTH, generator=generator) > 0.4


@given(
    bits=st.sampled_from([3, 4, 8]),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 0.3, 5.0, -5.0]),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_every_value_is_on_the_grid_and_zero_is_one_of_them(
    bits: int, group: int, symmetric: bool, shift: float, stored: torch.dtype, seed: int
) -> None:
    w_OI, mask_OI = problem(seed, shift)
    options = GridOptions(bits, group, symmetric)
    grid = make_grid(w_OI, mask_OI, options, stored=stored)
    assert torch.equal(grid.scale_OG.to(stored).double(), grid.scale_OG)
    level_OI = grid.levels(w_OI) * mask_OI
    value_OI = grid.values(level_OI)
    assert not value_OI[~mask_OI].any()
    zero_OI = grid.zero_OG.repeat_interleave(WIDTH // grid.zero_OG.shape[1], 1)
    integer_OI = level_OI + zero_OI
    assert torch.equal(integer_OI, integer_OI.round())
    assert integer_OI.min() >= -(2 ** (bits - 1))
    assert integer_OI.max() <= 2 ** (bits - 1) - 1
    # Half a step away at most; rounded scales may leave the ends of a range outside.
    slack = 0.5 + 2**bits * torch.finfo(stored).eps + (0 if symmetric else 0.5)
    error_OI = (value_OI - w_OI).abs() / grid.scales(WIDTH)
    assert float(error_OI[mask_OI].max()) <= slack


@pytest.mark.parametrize("symmetric", [True, False])
def test_removed_weights_do_not_widen_the_range(symmetric: bool) -> None:
    w_OI, mask_OI = problem()
    options = GridOptions(4, 4, symmetric)
    grid = make_grid(w_OI, mask_OI, options)
    changed = make_grid(w_OI.where(mask_OI, 1e6), mask_OI, options)
    assert torch.equal(grid.scale_OG, changed.scale_OG)
    assert torch.equal(grid.zero_OG, changed.zero_OG)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_without_kept_weights_is_all_zeros(symmetric: bool) -> None:
    w_OI, mask_OI = problem()
    mask_OI[:, :4] = False
    grid = make_grid(w_OI, mask_OI, GridOptions(3, 4, symmetric))
    value_OI = grid.values(grid.levels(w_OI) * mask_OI)
    assert torch.isfinite(value_OI).all()
    assert not value_OI[:, :4].any()


def test_the_ends_of_a_range_are_met() -> None:
    w_OI = torch.tensor([[-1.0, 0.2, 0.7, 2.0]], dtype=torch.float64)
    mask_OI = torch.ones_like(w_OI, dtype=torch.bool)
    kwargs = {"stored": torch.float64}
    symmetric = make_grid(w_OI, mask_OI, GridOptions(3, 0, True), **kwargs)
    assert symmetric.scale_OG.item() == pytest.approx(2 / 3)
    asymmetric = make_grid(w_OI, mask_OI, GridOptions(3, 0, False), **kwargs)
    assert asymmetric.scale_OG.item() == pytest.approx(3 / 7)
    assert asymmetric.zero_OG.item() == -2
    half = Clipping(torch.full((1, 1), 0.5).double(), torch.full((1, 1), 0.75).double())
    clipped = make_grid(w_OI, mask_OI, GridOptions(3, 0, False), half, **kwargs)
    assert clipped.scale_OG.item() == pytest.approx((1.5 + 0.5) / 7)


def by_hand(
    w_OI: Tensor, mask_OI: Tensor, options: GridOptions, lower: Tensor, upper: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ up · ŵ for both strengths, one weight at a time."""
    columns = options.columns(WIDTH)
    n_low, n_high = options.lowest, options.highest
    gradient_lower, gradient_upper = torch.zeros_like(lower), torch.zeros_like(upper)
    for row in range(ROWS):
        for group in range(WIDTH // columns):
            inside = slice(group * columns, (group + 1) * columns)
            kept = [
                float(w) for w, k in zip(w_OI[row, inside], mask_OI[row, inside], strict=True) if k
            ]
            smallest, largest = min([0.0, *kept]), max([0.0, *kept])
            low, high = lower[row, group] * smallest, upper[row, group] * largest
            if options.symmetric:
                from_high = high / n_high >= low / n_low
                scale = high / n_high if from_high else low / n_low
                d_scale = (0.0, largest / n_high) if from_high else (smallest / n_low, 0.0)
                zero, d_zero = 0.0, (0.0, 0.0)
            else:
                scale = (high - low) / (n_high - n_low)
                d_scale = (-smallest / (n_high - n_low), largest / (n_high - n_low))
                zero = float((n_low - low / scale).round())
                # −low / scale, rounding taken as the identity.
                d_zero = (
                    -smallest / scale + low / scale**2 * d_scale[0],
                    low / scale**2 * d_scale[1],
                )
            for column in range(inside.start, inside.stop):
                w = w_OI[row, column]
                level = float((w / scale).round())
                for strength, into in enumerate((gradient_lower, gradient_upper)):
                    if level < n_low - zero:
                        d = (n_low - zero) * d_scale[strength] - scale * d_zero[strength]
                    elif level > n_high - zero:
                        d = (n_high - zero) * d_scale[strength] - scale * d_zero[strength]
                    else:
                        d = (level - w / scale) * d_scale[strength]
                    into[row, group] += up[row, column] * d
    return gradient_lower, gradient_upper


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 12])
def test_gradients_of_the_strengths_are_those_worked_out_by_hand(
    symmetric: bool, group: int
) -> None:
    w_OI, mask_OI = problem()
    options = GridOptions(4, group, symmetric)
    groups = WIDTH // options.columns(WIDTH)
    generator = torch.Generator().manual_seed(7)
    lower, upper, up = (
        0.5 + 0.4 * torch.rand(ROWS, n, generator=generator, dtype=torch.float64)
        for n in (groups, groups, WIDTH)
    )
    expected = by_hand(w_OI, mask_OI, options, lower, upper, up)
    clipping = Clipping(lower.requires_grad_(), upper.requires_grad_())
    grid = make_grid(w_OI, mask_OI, options, clipping, stored=torch.float64)
    nearest_OI = grid.nearest(w_OI)
    assert torch.equal(nearest_OI, grid.values(grid.levels(w_OI)))
    (nearest_OI * up).sum().backward()
    for strength, gradient in zip((lower, upper), expected, strict=True):
        assert strength.grad is not None
        torch.testing.assert_close(strength.grad, gradient)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_range_costs_no_more_than_the_whole_one(symmetric: bool) -> None:
    w_OI, mask_OI = problem()
    w_OI[0, 0] = 30
    square_I = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)).double()
    options = GridOptions(3, 12, symmetric)

    def cost(clipping: Clipping | None) -> Tensor:
        grid = make_grid(w_OI, mask_OI, options, clipping)
        error_OI = (grid.values(grid.levels(w_OI)) - w_OI).square() * mask_OI * square_I
        return error_OI.unflatten(1, (-1, 12)).sum(2)

    found = search_clipping(w_OI, mask_OI, square_I, options)
    assert (cost(found) <= cost(None)).all()
    assert (cost(found) < cost(None)).any()


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    w_OI, mask_OI = problem()
    with pytest.raises(SecateurError, match="groups of 7 columns do not divide a width of 24"):
        make_grid(w_OI, mask_OI, GridOptions(4, 7, True))
