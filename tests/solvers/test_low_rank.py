"""The low-rank fit is the best of its rank on the inputs that made the Gram matrix."""

from __future__ import annotations

import pytest
import torch

from secateur.solvers.low_rank import low_rank_fit


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
