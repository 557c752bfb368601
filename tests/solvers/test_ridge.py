"""Refit of kept columns against least squares on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.solvers.elimination import eliminate, kept_first
from secateur.solvers.ridge import cut_loss, low_rank_fit, output_bias, ridge_refit
from solvers.problems import make_problem

ROWS, WIDTH = 6, 20


def tokens_and_weights(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    x_NI = x_NI @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    w_OI = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x_NI, w_OI


KEPT = torch.tensor([3, 0, 17, 8, 9, 12, 4])


def test_without_damping_it_is_least_squares() -> None:
    x_NI, w_OI = tokens_and_weights(100)
    found_OK = ridge_refit(w_OI, x_NI.T @ x_NI / 100, KEPT, damping=0)
    expected_KO = torch.linalg.lstsq(x_NI[:, KEPT], x_NI @ w_OI.T).solution
    torch.testing.assert_close(found_OK, expected_KO.T)


@pytest.mark.parametrize("own_target", [True, False])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_damping_pulls_towards_the_old_weights(own_target: bool, damping: float) -> None:
    x_NI, w_OI = tokens_and_weights(100)
    gram_II = x_NI.T @ x_NI
    y_NO = x_NI @ w_OI.T
    if not own_target:
        y_NO = y_NO + torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
    found_OK = ridge_refit(w_OI, gram_II, KEPT, damping, None if own_target else x_NI.T @ y_NO)
    # Ridge as least squares with additional rows.
    weight = (damping * gram_II.diagonal().mean()).sqrt()
    rows_KK = weight * torch.eye(len(KEPT), dtype=torch.float64)
    expected_KO = torch.linalg.lstsq(
        torch.cat([x_NI[:, KEPT], rows_KK]), torch.cat([y_NO, weight * w_OI[:, KEPT].T])
    ).solution
    torch.testing.assert_close(found_OK, expected_KO.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_with_all_columns_kept_the_weights_stay_as_they_are(
    damping: float, dtype: torch.dtype
) -> None:
    w_OI, gram_II = make_problem(dtype=dtype)
    everything = torch.arange(w_OI.shape[1])
    assert torch.equal(ridge_refit(w_OI, gram_II, everything, damping), w_OI)
    with_target = ridge_refit(w_OI, gram_II, everything, max(damping, 0.01), gram_II @ w_OI.T)
    torch.testing.assert_close(with_target, w_OI, rtol=1e-4, atol=1e-4)


@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([1, 5, 40, 400]),
    kept=st.integers(0, 24),
    damping=st.sampled_from([0.0, 1e-6, 0.01, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_loss_never_rises_on_its_own_tokens(
    seed: int, tokens: int, kept: int, damping: float, dtype: torch.dtype
) -> None:
    w_OI, gram_II = make_problem(8, 24, tokens, seed, dead=(5,), dtype=dtype)
    kept_K = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:kept]
    found_OK = ridge_refit(w_OI, gram_II, kept_K, damping)
    assert found_OK.shape == (8, kept)
    assert found_OK.isfinite().all()
    torch.testing.assert_close(found_OK[:, kept_K == 5], w_OI[:, [5] * int((kept_K == 5).sum())])
    w_OI, gram_II, found_OK = w_OI.double(), gram_II.double(), found_OK.double()
    before = cut_loss(w_OI, w_OI[:, kept_K], kept_K, gram_II)
    everything = cut_loss(w_OI, w_OI[:, :0], kept_K[:0], gram_II)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert cut_loss(w_OI, found_OK, kept_K, gram_II) <= before + rounding * (before + everything)


def test_wider_is_never_worse() -> None:
    w_OI, gram_II = make_problem()
    columns_I = kept_first(eliminate(w_OI, gram_II).order_U)
    losses = torch.stack(
        [
            cut_loss(w_OI, ridge_refit(w_OI, gram_II, kept_K, damping=0), kept_K, gram_II)
            for kept_K in (columns_I[:width] for width in range(len(columns_I) + 1))
        ]
    )
    assert (losses.diff() <= 1e-9 * losses[0]).all()
    assert losses[-1] == 0


def test_the_losses_of_elimination_are_those_of_the_refit() -> None:
    w_OI, gram_II = make_problem(width=24)
    found = eliminate(w_OI, gram_II, 2, damping=0)
    columns_I = kept_first(found.order_U, 2)
    for removed in range(1, 13):
        kept_K = columns_I[: 24 - 2 * removed]
        refitted_OK = ridge_refit(w_OI, gram_II, kept_K, damping=0)
        loss = cut_loss(w_OI, refitted_OK, kept_K, gram_II)
        torch.testing.assert_close(found.losses_U[removed - 1], loss)


def test_without_refit_the_bias_is_what_was_removed_on_average() -> None:
    x_NI, w_OI = tokens_and_weights(50)
    removed = [i for i in range(WIDTH) if i not in KEPT.tolist()]
    bias_O = output_bias(w_OI, w_OI[:, KEPT], KEPT, x_NI.mean(0))
    torch.testing.assert_close(bias_O, (x_NI[:, removed] @ w_OI[:, removed].T).mean(0))


def test_a_centred_refit_with_bias_is_least_squares_with_intercept() -> None:
    x_NI, w_OI = tokens_and_weights(100)
    mean_I = x_NI.mean(0)
    centred_II = x_NI.T @ x_NI / 100 - mean_I.outer(mean_I)
    found_OK = ridge_refit(w_OI, centred_II, KEPT, damping=0)
    bias_O = output_bias(w_OI, found_OK, KEPT, mean_I)
    ones_N1 = torch.ones(100, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x_NI[:, KEPT], ones_N1], 1), x_NI @ w_OI.T).solution
    torch.testing.assert_close(found_OK, expected[:-1].T)
    torch.testing.assert_close(bias_O, expected[-1])


def test_a_target_repairs_an_error_made_elsewhere() -> None:
    x_NI, w_OI = tokens_and_weights(100)
    v_OI = w_OI + 0.3
    gram_II = x_NI.T @ x_NI
    everything = torch.arange(WIDTH)
    found_OI = ridge_refit(w_OI, gram_II, everything, 0.0, x_NI.T @ (x_NI @ v_OI.T))
    torch.testing.assert_close(found_OI, v_OI)


def test_arguments_are_left_as_they_were() -> None:
    w_OI, gram_II = make_problem()
    target_IO = gram_II @ w_OI.T
    before = [tensor.clone() for tensor in (w_OI, gram_II, target_IO)]
    kept_K = torch.arange(10)
    ridge_refit(w_OI, gram_II, kept_K)
    v_OK = ridge_refit(w_OI, gram_II, kept_K, target_IO=target_IO)
    cut_loss(w_OI, v_OK, kept_K, gram_II)
    for tensor, copy in zip((w_OI, gram_II, target_IO), before, strict=True):
        assert torch.equal(tensor, copy)


def test_values_that_are_not_finite_are_refused() -> None:
    w_OI, gram_II = make_problem()
    kept_K = torch.arange(10)
    with pytest.raises(SecateurError, match="weights"):
        ridge_refit(w_OI * torch.nan, gram_II, kept_K)
    with pytest.raises(SecateurError, match="Gram"):
        ridge_refit(w_OI, gram_II * torch.inf, kept_K)
    with pytest.raises(SecateurError, match="targets"):
        ridge_refit(w_OI, gram_II, kept_K, target_IO=torch.full((48, 24), torch.inf))


def inputs(tokens: int = 400, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(width, width, generator=generator)
    scale_I = torch.logspace(-1, 1, width)
    return torch.randn(tokens, width, generator=generator) * scale_I @ mixing_II


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    x_NI = inputs()
    residual_OI = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    s_OR, x_RI = low_rank_fit(residual_OI, x_NI.T @ x_NI / len(x_NI), rank)
    assert s_OR.shape == (9, rank)
    output_NO = (x_NI @ residual_OI.T).double()
    error = (output_NO - (x_NI @ x_RI.T @ s_OR.T).double()).square().sum()
    # No product of this rank can be nearer to the outputs than their own truncation.
    tail = torch.linalg.svdvals(output_NO)[rank:].square().sum()
    assert float(tail) * (1 - 1e-4) <= float(error) <= 1.02 * float(tail)


def test_more_than_the_rank_there_is_restores_everything() -> None:
    x_NI = inputs()
    residual_OI = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    s_OR, x_RI = low_rank_fit(residual_OI, x_NI.T @ x_NI, 5)
    torch.testing.assert_close(s_OR @ x_RI, residual_OI, rtol=1e-3, atol=1e-4)
    assert not bool(s_OR[:, 3:].any())


def test_nothing_missing_adds_nothing() -> None:
    s_OR, x_RI = low_rank_fit(torch.zeros(3, 12), torch.zeros(12, 12), 2)
    assert not bool((s_OR @ x_RI).any())
    assert bool(x_RI.isfinite().all())
