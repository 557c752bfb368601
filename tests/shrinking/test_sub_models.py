"""Widths of sub-models, and their divergence from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.shrinking import sub_models
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import divergences, draw_widths

COSTS = [[0, 10, 20], list(range(0, 65, 4)), [0, 7], [0, 2, 3, 4, 4, 6, 8, 9]]


def draw(seed: int = 0, sparsity: float = 0.3, count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(draw_widths(COSTS, [sparsity] * count, generator))


def test_places_are_in_the_grid_and_few() -> None:
    for cost, place_N in zip(COSTS, draw().unbind(1), strict=True):
        assert set(place_N.tolist()) <= set(range(len(cost)))
        assert len(place_N.unique()) <= 9


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_what_is_left_scatters_around_the_sparsity(sparsity: float) -> None:
    share_N = draw(sparsity=sparsity, count=320)[:, 1] / 16
    present_N = share_N[share_N > 0]
    # A few are gone altogether, the rest is even over its range.
    assert float(share_N.mean()) == pytest.approx((1 - sparsity) * 23 / 24, abs=0.03)
    assert float(present_N.min()) >= 1 - 2 * sparsity - 1 / 16


def test_every_sub_block_is_sometimes_gone_and_independently() -> None:
    gone_NS = draw(count=240, sparsity=0.1) == 0
    assert gone_NS.sum(0).tolist() == [10, 10, 10, 10]
    assert int(gone_NS.all(1).sum()) == 0


def test_a_seed_decides() -> None:
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_divergence_is_that_of_the_logits(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_source(checkpoints("gemma2")).store(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids_WL = torch.randint(4, 260, (2, 7), generator=generator)
    dense_WLD = torch.randn(2, 7, 32, generator=generator)
    broken_WLD = dense_WLD.clone().index_fill(2, torch.tensor([3]), torch.nan)
    states_NWLD = torch.stack([dense_WLD, -dense_WLD, broken_WLD])

    def found() -> list[float]:
        with store.head():
            return divergences(
                store.blocks, ids_WL, dense_WLD, states_NWLD, torch.device("cpu"), torch.float32
            )

    whole = found()
    monkeypatch.setattr(sub_models, "_LOGITS", 3 * 260)
    assert found() == pytest.approx(whole, rel=1e-5, abs=1e-7)
    same, other, broken = whole
    assert same == pytest.approx(0, abs=1e-6)
    assert other > 0.01
    assert broken == float("inf")
