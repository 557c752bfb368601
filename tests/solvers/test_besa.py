"""Masks by rank, and gradients of rates against dense autograd and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prodigyopt import Prodigy
from torch import Tensor

from costs import LiveBytes
from secateur.methods.descent import stepping
from secateur.patterns.pattern import Budget, Unstructured, select
from secateur.runs.errors import SecateurError
from secateur.solvers import besa, pieces
from secateur.solvers.besa import (
    apply_counts,
    ascending_ranks,
    mask_of_counts,
    masked_linear,
    removal_curve,
)
from secateur.solvers.rates import (
    candidate_counts,
    candidate_rates,
    exact_counts,
    expected_rate,
    rate_distribution,
    truncated_counts,
)
from secateur.solvers.scores import wanda_score

ROWS, COLUMNS = 12, 37


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[1, 40, pieces._CHUNK_CPU])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are handled one, one or two, or all at a time."""
    monkeypatch.setattr(pieces, "_CHUNK_CPU", request.param)
    monkeypatch.setattr(besa, "_FEWEST_ROWS", 1)


@pytest.mark.usefixtures("chunk")
def test_ranks_are_the_inverse_of_the_stable_order() -> None:
    score_OI = normal(ROWS, COLUMNS).abs().mul(3).round()  # many ties
    rank_OI = ascending_ranks(score_OI)
    assert rank_OI.dtype == torch.int16
    order_OI = score_OI.argsort(dim=1, stable=True)
    assert torch.equal(rank_OI.long(), order_OI.argsort(dim=1))


def test_wide_rows_have_wider_ranks() -> None:
    widest = 2**15 - 1
    assert ascending_ranks(torch.zeros(1, widest)).dtype == torch.int16
    rank_OI = ascending_ranks(torch.zeros(1, widest + 1))
    assert rank_OI.dtype == torch.int32
    assert torch.equal(rank_OI[0], torch.arange(widest + 1, dtype=torch.int32))
    for columns in (widest, widest + 1):
        rank_OI = ascending_ranks(normal(1, columns))
        for count in (0, columns):
            mask_OI = mask_of_counts(rank_OI, torch.tensor([count]))
            assert int(mask_OI.count_nonzero()) == columns - count
            w_OI = apply_counts(torch.ones(1, columns), rank_OI, torch.tensor([count]))
            assert int(w_OI.sum()) == columns - count


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(SecateurError, match="NaN"):
        ascending_ranks(torch.tensor([[1.0, math.nan]]))


@given(
    columns=st.integers(1, 60),
    counts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 9),
)
def test_rows_lose_their_lowest_scores_and_masks_are_nested(
    columns: int, counts: tuple[float, float], seed: int
) -> None:
    score_OI = normal(2, columns, seed=seed).abs()
    rank_OI = ascending_ranks(score_OI)
    fewer, more = sorted(int(count * columns) for count in counts)
    masks = [mask_of_counts(rank_OI, torch.full((2,), count)) for count in (fewer, more)]
    assert bool((masks[0] | ~masks[1]).all())
    for count, mask_OI in zip((fewer, more), masks, strict=True):
        assert (~mask_OI).sum(1).tolist() == [count, count]
        pruned = score_OI.masked_fill(mask_OI, -torch.inf).amax(1)
        kept = score_OI.masked_fill(~mask_OI, torch.inf).amin(1)
        assert bool((pruned <= kept).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kept_weights_are_untouched_and_zeros_exact(dtype: torch.dtype) -> None:
    w_OI = normal(ROWS, COLUMNS).to(dtype)
    rank_OI = ascending_ranks(normal(ROWS, COLUMNS, seed=1))
    count_O = torch.arange(ROWS) * 3
    mask_OI = mask_of_counts(rank_OI, count_O)
    masked_OI = apply_counts(w_OI, rank_OI, count_O)
    assert masked_OI.dtype == dtype
    assert torch.equal(masked_OI[mask_OI], w_OI[mask_OI])
    assert not masked_OI[~mask_OI].any() and not masked_OI[~mask_OI].signbit().any()
    none_O, all_O = torch.zeros(ROWS).long(), torch.full((ROWS,), COLUMNS)
    assert torch.equal(apply_counts(w_OI, rank_OI, none_O), w_OI)
    assert not apply_counts(w_OI, rank_OI, all_O).any()


@pytest.mark.parametrize("columns", [8, 576])
@pytest.mark.parametrize("smooth", [True, False])
def test_zero_logits_are_wanda_at_one_half(columns: int, smooth: bool) -> None:
    w_OI = normal(ROWS, columns, dtype=torch.float32).mul(4).round()  # many ties
    score_OI = wanda_score(w_OI, normal(columns, seed=1, dtype=torch.float32).square())
    rates = candidate_rates()
    beta_OD = rate_distribution(torch.zeros(ROWS, len(rates)), smooth=smooth)
    count_O = truncated_counts(expected_rate(beta_OD, rates), ROWS, columns)
    mask_OI = mask_of_counts(ascending_ranks(score_OI), count_O)
    budget = Budget.uniform(Unstructured(0.5), [ROWS], columns)
    assert torch.equal(mask_OI, select(score_OI, budget, scope="row"))


@given(widths=st.lists(st.integers(1, 31), min_size=1, max_size=4), share=st.floats(0, 1))
def test_masks_of_a_block_meet_its_budget_exactly(widths: list[int], share: float) -> None:
    ranks = [ascending_ranks(normal(5, width, seed=width)) for width in widths]
    columns_R = torch.tensor(widths).repeat_interleave(5)
    total = round(share * 5 * sum(widths))
    count_R = exact_counts(normal(len(columns_R)), columns_R, total)
    masks = map(mask_of_counts, ranks, count_R.split(5))
    assert sum(int((~mask).sum()) for mask in masks) == total


def dense_straight_through(
    w_OI: Tensor, score_OI: Tensor, beta_GD: Tensor, counts_D: Tensor, count_O: Tensor
) -> Tensor:
    """Masked weights the long way: mask − stopgrad(probability) + probability, all dense."""
    order_OI = score_OI.argsort(dim=1, stable=True)
    position_I = torch.arange(w_OI.shape[1])
    removed_DI = (position_I < counts_D[:, None]).to(w_OI)
    beta_OD = beta_GD.repeat_interleave(len(w_OI) // len(beta_GD), 0)
    survival_OI = torch.zeros_like(w_OI).scatter(1, order_OI, 1 - beta_OD @ removed_DI)
    kept_OI = (position_I >= count_O[:, None]).to(w_OI)
    mask_OI = torch.zeros_like(w_OI).scatter(1, order_OI, kept_OI)
    return w_OI * (mask_OI - survival_OI.detach() + survival_OI)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("distributions", [ROWS, ROWS // 3, 1])
def test_the_gradient_is_that_of_dense_straight_through(distributions: int) -> None:
    rates = candidate_rates(0.05)
    counts_D = torch.tensor(candidate_counts(rates, COLUMNS))
    w_OI, score_OI = normal(ROWS, COLUMNS), normal(ROWS, COLUMNS, seed=1)
    x, target = normal(2, 9, COLUMNS, seed=2), normal(2, 9, ROWS, seed=3)
    theta_GD = normal(distributions, len(rates), seed=4) * 2
    results = []
    for dense in (True, False):
        theta, inputs = theta_GD.clone().requires_grad_(), x.clone().requires_grad_()
        beta_GD = rate_distribution(theta, smooth=True)
        count_O = truncated_counts(expected_rate(beta_GD, rates), ROWS, COLUMNS)
        if dense:
            y = inputs @ dense_straight_through(w_OI, score_OI, beta_GD, counts_D, count_O).T
        else:
            rank_OI = ascending_ranks(score_OI)
            y = masked_linear(inputs, w_OI, rank_OI, count_O, beta_GD, counts_D)
        (y - target).square().sum().backward()
        assert theta.grad is not None and inputs.grad is not None
        results.append((y.detach(), theta.grad, inputs.grad))
    for dense_value, value in zip(*results, strict=True):
        torch.testing.assert_close(value, dense_value, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("chunk")
def test_the_curve_of_each_row_is_a_plain_sum() -> None:
    counts_D = torch.tensor(candidate_counts(candidate_rates(0.07), COLUMNS))
    w_OI, gradient_OI = normal(ROWS, COLUMNS), normal(ROWS, COLUMNS, seed=1)
    rank_OI = ascending_ranks(normal(ROWS, COLUMNS, seed=2))
    beta_OD = torch.zeros(ROWS, len(counts_D), dtype=torch.float64, requires_grad=True)
    count_O = torch.full((ROWS,), 20)
    one_hot_II = torch.eye(COLUMNS, dtype=torch.float64)
    y_IO = masked_linear(one_hot_II, w_OI, rank_OI, count_O, beta_OD, counts_D)
    (y_IO.T * gradient_OI).sum().backward()
    assert beta_OD.grad is not None
    for row in range(ROWS):
        for candidate, count in enumerate(counts_D.tolist()):
            expected = sum(
                float(w_OI[row, column] * gradient_OI[row, column])
                for column in range(COLUMNS)
                if int(rank_OI[row, column]) < count
            )
            assert -float(beta_OD.grad[row, candidate]) == pytest.approx(expected, abs=1e-10)


def test_pruned_weights_count_in_the_gradient() -> None:
    counts_D = torch.tensor(candidate_counts(candidate_rates(0.1), COLUMNS))
    w_OI, gradient_OI = normal(ROWS, COLUMNS), normal(ROWS, COLUMNS, seed=1)
    rank_OI = ascending_ranks(w_OI.abs())
    mask_OI = mask_of_counts(rank_OI, torch.full((ROWS,), 18))
    curves = [
        removal_curve(w_OI * gradient_OI * part, rank_OI, counts_D)
        for part in (1, mask_OI.double())
    ]
    assert not torch.allclose(curves[0], curves[1])


@pytest.mark.parametrize("distributions", [5, 0, 24])
def test_rows_that_cannot_share_are_refused(distributions: int) -> None:
    w_OI = normal(ROWS, COLUMNS)
    beta_GD, counts_D = torch.zeros(distributions, 2), torch.tensor([COLUMNS, 0])
    with pytest.raises(SecateurError, match="evenly"):
        masked_linear(
            normal(2, COLUMNS), w_OI, ascending_ranks(w_OI), torch.zeros(ROWS), beta_GD, counts_D
        )


def test_a_masked_linear_follows_autocast_and_adds_its_bias() -> None:
    w_OI, x = normal(ROWS, COLUMNS, dtype=torch.float32), normal(9, COLUMNS, dtype=torch.float32)
    rank_OI, count_O = ascending_ranks(w_OI.abs()), torch.full((ROWS,), 18)
    bias_O = normal(ROWS, seed=5, dtype=torch.float32)
    counts_D = torch.arange(0, COLUMNS, 4)
    beta_OD = torch.zeros(ROWS, len(counts_D)).requires_grad_()
    x.requires_grad_()
    expected = torch.nn.functional.linear(x, apply_counts(w_OI, rank_OI, count_O), bias_O)
    y = masked_linear(x, w_OI, rank_OI, count_O, beta_OD, counts_D, bias_O)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    exact, beta_OD.grad = beta_OD.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, w_OI, rank_OI, count_O, beta_OD, counts_D, bias_O)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().sum()
    loss.backward()
    torch.testing.assert_close(y.float(), expected, atol=0.2, rtol=0.02)
    assert exact is not None and beta_OD.grad is not None and beta_OD.grad.dtype == torch.float32
    assert float((beta_OD.grad - exact).norm() / exact.norm()) < 0.05
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_weights_stored_the_other_way_round_serve_as_well() -> None:
    w_OI = normal(COLUMNS, ROWS).T
    rank_OI, count_O = ascending_ranks(w_OI.abs()), torch.full((ROWS,), 18)
    beta_OD, counts_D = torch.zeros(ROWS, 2), torch.tensor([COLUMNS, 0])
    y = masked_linear(normal(3, COLUMNS), w_OI, rank_OI, count_O, beta_OD, counts_D)
    torch.testing.assert_close(y, normal(3, COLUMNS) @ (w_OI * mask_of_counts(rank_OI, count_O)).T)


def test_a_step_needs_little_more_than_ranks_and_one_masked_linear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four linears, fp32: 2 bytes per weight for ranks, one Ŵ at a time, and a chunk of rows."""
    linears, width, tokens = 4, 512, 4
    chunk = 2**15
    monkeypatch.setattr(pieces, "_CHUNK_CPU", chunk)
    monkeypatch.setattr(besa, "_FEWEST_ROWS", 1)
    weights = [normal(width, width, seed=seed, dtype=torch.float32) for seed in range(linears)]
    x = normal(tokens, width, dtype=torch.float32).requires_grad_()
    counts_D = torch.tensor(candidate_counts(candidate_rates(), width))
    with LiveBytes() as memory:
        ranks = [ascending_ranks(w.abs()) for w in weights]
        betas = [torch.zeros(1, 101).requires_grad_() for _ in weights]
        count_O = torch.full((width,), width // 2)
        setup = memory.peak
        h = x
        for w, rank, beta_GD in zip(weights, ranks, betas, strict=True):
            h = masked_linear(h, w, rank, count_O, beta_GD, counts_D)
        h.square().sum().backward()
    elements = width * width
    ranking = 2 * linears * elements + 4 * elements + 20 * chunk
    # One masked linear with what makes its mask, or a chunk of rows with the curves of all.
    working = max(6 * elements, 24 * chunk + 2 * 4 * 101 * width)
    activations = 12 * linears * tokens * width * 4
    assert setup <= ranking + 4 * width
    assert memory.peak <= 2 * linears * elements + working + activations
    assert memory.peak <= 4 * linears * elements + activations


def test_logits_of_every_row_and_their_adam_fit_into_four_bytes_per_weight() -> None:
    """At SmolLM2's 576 columns: 2 for ranks, and three numbers for each of 101 logits of a row."""
    linears, width = 6, 576
    rates = candidate_rates()
    counts_D = torch.tensor(candidate_counts(rates, width))
    weights = [normal(width, width, seed=seed, dtype=torch.float32) for seed in range(linears)]
    x = normal(2, width, dtype=torch.float32)
    with LiveBytes() as memory:
        ranks = [ascending_ranks(w.abs()) for w in weights]
        thetas = [torch.zeros(width, len(rates)) for _ in weights]
        with stepping(dict.fromkeys(thetas, 0.1)):
            for _ in range(2):
                # The first step makes the moments.
                memory.peak = memory.live
                h = x
                for w, rank_OI, theta_OD in zip(weights, ranks, thetas, strict=True):
                    beta_OD = rate_distribution(theta_OD, smooth=False)
                    count_O = truncated_counts(expected_rate(beta_OD, rates), *w.shape)
                    h = masked_linear(h, w, rank_OI, count_O, beta_OD, counts_D)
                del beta_OD
                h.square().mean().backward()
    # Of one linear at a time there is more, as in any backward pass.
    working = 8 * width * width
    assert memory.peak - working <= 4 * linears * width * width


def prodigy_reference(
    parameters: list[Tensor], gradients: list[list[Tensor]], d_coef: float
) -> tuple[list[Tensor], float]:
    """Prodigy as BESA was released with it: no bias correction, one d for all tensors."""
    beta1, beta2, d0, epsilon = 0.9, 0.999, 1e-6, 1e-8
    beta3, d, d_max, numerator = math.sqrt(beta2), d0, d0, 0.0
    start = [p.clone() for p in parameters]
    now = [p.clone() for p in parameters]
    m, v, s = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
    for step in gradients:
        numerator *= beta3
        for i, g in enumerate(step):
            numerator += d / d0 * d * float((g * (start[i] - now[i])).sum())
            m[i] = beta1 * m[i] + (1 - beta1) * d * g
            v[i] = beta2 * v[i] + (1 - beta2) * d * d * g * g
            s[i] = beta3 * s[i] + d / d0 * d * g
        estimate = d_coef * numerator / sum(float(t.abs().sum()) for t in s)
        before = d
        d = max(d, estimate) if d == d0 else d
        d_max = max(d_max, estimate)
        d = d_max
        now = [p - before * a / (b.sqrt() + d * epsilon) for p, a, b in zip(now, m, v, strict=True)]
    return now, d


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_prodigy_is_the_optimiser_that_besa_was_released_with(scale: float) -> None:
    start = [normal(3), normal(2, 4, seed=1)]
    gradients = [[scale * (p + normal(*p.shape, seed=step)) for p in start] for step in range(8)]
    expected, d = prodigy_reference(start, gradients, d_coef=5.0)
    parameters = [p.clone().requires_grad_() for p in start]
    optimiser = Prodigy(parameters, d_coef=5.0)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
    assert d > 1e-6
    assert optimiser.param_groups[0]["d"] == pytest.approx(d, rel=1e-9)
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-9, atol=1e-12)


def test_weights_that_want_a_gradient_get_that_of_the_kept_ones() -> None:
    x_NI, w_OI = normal(9, COLUMNS), normal(ROWS, COLUMNS, seed=1).requires_grad_()
    rank_OI = ascending_ranks(normal(ROWS, COLUMNS, seed=2))
    count_O = torch.arange(ROWS) * 3
    counts_D = torch.tensor([COLUMNS, 10, 0])
    up_NO = normal(9, ROWS, seed=3)
    beta_GD = torch.zeros(ROWS, 3, dtype=torch.float64, requires_grad=True)
    masked_linear(x_NI, w_OI, rank_OI, count_O, beta_GD, counts_D).backward(up_NO)
    gradient_OI = up_NO.T @ x_NI
    assert w_OI.grad is not None and beta_GD.grad is not None
    torch.testing.assert_close(w_OI.grad, gradient_OI * mask_of_counts(rank_OI, count_O))
    curve_OD = removal_curve(gradient_OI * w_OI.detach(), rank_OI, counts_D)
    torch.testing.assert_close(beta_GD.grad, -curve_OD)
