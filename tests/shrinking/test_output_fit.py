"""How far a fit of an output matrix is trusted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.shrinking.output_fit import fit_output

KEPT = torch.arange(4, 24)


def inputs(tokens: int, seed: int) -> Tensor:
    """Inputs of 24 columns that ten numbers and some noise make."""
    mixing = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    noise_NI = 0.3 * torch.randn(tokens, 24, generator=generator)
    return torch.randn(tokens, 10, generator=generator) @ mixing + noise_NI


def gram(x_NI: Tensor) -> Tensor:
    return x_NI.T @ x_NI / len(x_NI)


W_OI = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
HELD_OUT = gram(inputs(2000, 9))


def test_losses_are_those_of_the_outputs() -> None:
    x_NI = inputs(2000, 9)
    fit = fit_output(W_OI, gram(inputs(2000, 2)), HELD_OUT, KEPT)
    dense_NO = x_NI @ W_OI.T
    loss = float((x_NI[:, KEPT] @ fit.v_OK.T - dense_NO).square().sum(1).mean())
    plain = float((x_NI[:, KEPT] @ W_OI[:, KEPT].T - dense_NO).square().sum(1).mean())
    assert (fit.loss, fit.plain_loss) == (
        pytest.approx(loss, rel=1e-4),
        pytest.approx(plain, rel=1e-4),
    )
    assert fit.changed
    assert loss < plain / 2


def test_with_little_text_the_pull_is_stronger_and_the_loss_never_above_plain() -> None:
    for seed in range(20):
        few = gram(inputs(6, seed))
        fit = fit_output(W_OI, few, HELD_OUT, KEPT)
        assert fit.loss <= fit.plain_loss
        assert fit.changed == (fit.loss < fit.plain_loss)
        if not fit.changed:
            assert torch.equal(fit.v_OK, W_OI[:, KEPT])


def test_text_of_another_kind_is_not_fitted_to() -> None:
    other = torch.zeros(24, 24)
    other[0, 0] = other[0, 5] = other[5, 0] = other[5, 5] = 1.0
    unrelated = torch.eye(24)
    fit = fit_output(W_OI, other, unrelated, KEPT)
    assert not fit.changed
    assert fit.loss == fit.plain_loss


def test_nothing_may_be_left() -> None:
    fit = fit_output(W_OI, HELD_OUT, HELD_OUT, torch.arange(0))
    assert fit.v_OK.shape == (8, 0)
    assert fit.loss == pytest.approx(float(((W_OI @ HELD_OUT) * W_OI).sum()), rel=1e-5)
