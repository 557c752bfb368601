"""The closed forms against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocation.allocation import BlockCounts, ScoredBlock
from secateur.allocation.dlp import dlp_sparsities
from secateur.allocation.loss import block_bounds
from secateur.allocation.owl import outlier_share, owl_sparsities
from secateur.allocation.ramp import ramp_sparsities
from secateur.pruning.recipe import Recipe

shares = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(target=st.floats(0, 1), count=st.integers(1, 60), rise=st.floats(-0.9, 0.9))
def test_ramp_is_an_arithmetic_progression_with_the_target_as_mean(
    target: float, count: int, rise: float
) -> None:
    sparsities = ramp_sparsities(target, count, rise)
    assert np.mean(sparsities) == pytest.approx(target, abs=1e-12)
    np.testing.assert_allclose(np.diff(sparsities, 2), 0, atol=1e-12)
    if count > 1:
        assert sparsities[-1] - sparsities[0] == pytest.approx(rise, abs=1e-12)


def test_outlier_share_is_that_of_all_scores_together() -> None:
    scores = [torch.rand(7, 5).pow(8), 3 * torch.rand(11, 3).pow(8)]
    together = torch.cat([score.flatten().double() for score in scores])
    expected = (together > 2.5 * together.mean()).double().mean()
    assert outlier_share(scores, 2.5) == pytest.approx(float(expected))
    assert outlier_share([], 5) == 0


@given(shares=shares, target=st.floats(0.3, 0.7), limit=st.floats(0, 0.3))
def test_owl_against_its_formula(shares: list[float], target: float, limit: float) -> None:
    found = np.array(owl_sparsities(target, shares, limit))
    share = np.array(shares)
    if np.ptp(share) > 0:
        scaled = (share - share.min()) / np.ptp(share) * 2 * limit
        np.testing.assert_allclose(found, 1 - (scaled - scaled.mean() + 1 - target), atol=1e-12)
    assert found.mean() == pytest.approx(target, abs=1e-9)
    # By value: shares an ulp apart may round to the same sparsity.
    assert found[share.argmax()] == found.min()


@given(medians=st.lists(st.floats(0.01, 10), min_size=2, max_size=40), target=st.floats(0.3, 0.7))
def test_dlp_against_its_formula(medians: list[float], target: float) -> None:
    found = np.array(dlp_sparsities(target, medians, 0.15))
    importance = 1 - np.array(medians) / np.sum(medians)
    assert found.mean() == pytest.approx(target, abs=1e-9)
    if np.ptp(importance) > 1e-9:
        d = 2 * 0.15 * (importance - importance.min()) / np.ptp(importance)
        np.testing.assert_allclose(found, target + d.mean() - d, atol=1e-9)
        assert found[np.argmax(medians)] == found.max()


def test_blocks_stay_within_the_limit_and_what_their_linears_allow() -> None:
    counts = BlockCounts(["a", "b"], [100, 300], [50, 150])

    def bounds(limit: float, low: list[int], high: list[int]) -> tuple[int, int]:
        scored = ScoredBlock(np.zeros((2, 1), np.int32), low, high)
        return block_bounds(counts, 0.5, limit, scored)

    assert bounds(0.12, [0, 0], [100, 300]) == (152, 248)
    assert bounds(0.12, [50, 150], [60, 150]) == (200, 210)
    assert bounds(0.0, [0, 0], [100, 300]) == (200, 200)


@pytest.mark.parametrize("method", ["loss", "sensitivity"])
def test_the_option_rows_still_says_the_scope(method: str) -> None:
    for rows, scope in (("even", "row"), ("free", "linear")):
        recipe = Recipe.from_mapping({"allocation": {"method": method, "rows": rows}})
        assert recipe.allocation.model_dump()["scope"] == scope
