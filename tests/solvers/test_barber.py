"""Exchanged pairs against their definition, unit by unit."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns.pattern import NM, Pattern, Scope, Unstructured
from secateur.runs.errors import SecateurError
from secateur.solvers.barber import barber_score, rebuild_masks

ANY = Unstructured(0.5)
SHAPES = [(6, 12), (6, 12), (9, 6)]
SCOPES: list[Scope] = ["block", "linear", "row", "column"]


def part(seed: int, pattern: Pattern = ANY, levels: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Scores, of few different values if ``levels`` is given, and random masks."""
    generator = torch.Generator().manual_seed(seed)
    scores, masks = [], []
    for rows, width in SHAPES:
        score_OI = torch.rand(rows, width, generator=generator, dtype=torch.float64)
        scores.append((score_OI * levels).floor() if levels else score_OI)
        noise_OI = torch.rand(rows, width, generator=generator)
        if isinstance(pattern, NM):
            noise_OGM = noise_OI.unflatten(1, (-1, pattern.m))
            ranks_OGM = noise_OGM.argsort(dim=2).argsort(dim=2)
            masks.append((ranks_OGM < pattern.n).flatten(1))
        else:
            masks.append(noise_OI < 0.6)
    return scores, masks


def units(tensors: list[Tensor], scope: str) -> list[Tensor]:
    if scope == "block":
        return [torch.cat([t.flatten() for t in tensors])]
    if scope == "linear":
        return [t.flatten() for t in tensors]
    if scope == "row":
        return [row for t in tensors for row in t]
    if scope == "column":
        return [column for t in tensors for column in t.T]
    return [group for t in tensors for group in t.reshape(-1, int(scope))]


def expected_exchange(score_N: Tensor, mask_N: Tensor, ratio: float) -> tuple[float, int]:
    """Kept score and exchanged pairs, by sorting as the definition says."""
    removed = sorted(score_N[~mask_N].tolist(), reverse=True)
    kept = sorted(score_N[mask_N].tolist())
    pairs = sum(g > p for g, p in zip(removed, kept, strict=False))
    count = int(pairs * ratio)
    return sum(kept) + sum(removed[:count]) - sum(kept[:count]), count


@pytest.mark.parametrize("levels", [0, 4, 1])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_unit_exchanges_its_first_pairs(scope: Scope, ratio: float, levels: int) -> None:
    scores, masks = part(0, levels=levels)
    rebuilt = rebuild_masks(scores, masks, ANY, scope, ratio)
    assert [mask.shape for mask in rebuilt] == [mask.shape for mask in masks]
    for score_N, before_N, after_N in zip(
        units(scores, scope),
        units(masks, scope),
        units(rebuilt, scope),
        strict=True,
    ):
        kept, count = expected_exchange(score_N, before_N, ratio)
        assert int((before_N & ~after_N).sum()) == int((after_N & ~before_N).sum()) == count
        assert float(score_N[after_N].sum()) == pytest.approx(kept)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_whole_ratio_keeps_the_highest_scores_and_is_settled(scope: Scope) -> None:
    scores, masks = part(1)
    rebuilt = rebuild_masks(scores, masks, ANY, scope, 1)
    for score_N, mask_N in zip(units(scores, scope), units(rebuilt, scope), strict=True):
        if mask_N.any() and not mask_N.all():
            assert score_N[mask_N].min() > score_N[~mask_N].max()
    again = rebuild_masks(scores, rebuilt, ANY, scope, 1)
    assert all(map(torch.equal, rebuilt, again))


@given(
    seed=st.integers(0, 1000),
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    levels=st.sampled_from([0, 1, 3]),
    case=st.sampled_from([*((ANY, g) for g in SCOPES), (NM(2, 3), "row"), (NM(1, 6), "row")]),
)
def test_exchanges_of_a_smaller_ratio_are_among_those_of_a_larger_one(
    seed: int,
    ratios: tuple[float, float],
    levels: int,
    case: tuple[Pattern, Scope],
) -> None:
    pattern, scope = case
    scores, masks = part(seed, pattern, levels)
    small, large = (rebuild_masks(scores, masks, pattern, scope, ratio) for ratio in sorted(ratios))
    for mask_OI, small_OI, large_OI in zip(masks, small, large, strict=True):
        assert not ((small_OI ^ mask_OI) & ~(large_OI ^ mask_OI)).any()


@pytest.mark.parametrize("pattern", [NM(2, 3), NM(1, 3), NM(3, 6), NM(1, 6)])
@pytest.mark.parametrize("levels", [0, 3, 1])
def test_groups_stay_exact_and_reach_their_highest_scores(pattern: NM, levels: int) -> None:
    scores, masks = part(2, pattern, levels)
    for ratio in (0.0, 0.3, 1.0):
        rebuilt = rebuild_masks(scores, masks, pattern, "row", ratio)
        for score_M, before_M, after_M in zip(
            units(scores, str(pattern.m)),
            units(masks, str(pattern.m)),
            units(rebuilt, str(pattern.m)),
            strict=True,
        ):
            assert int(after_M.sum()) == pattern.n
            assert score_M[after_M].sum() >= score_M[before_M].sum() - 1e-12
            if ratio == 0:
                assert torch.equal(before_M, after_M)
            if ratio == 1:
                top = score_M.topk(pattern.n).values.sum()
                assert float(score_M[after_M].sum()) == pytest.approx(float(top))


def test_of_a_rows_pairs_in_groups_those_of_the_largest_gain_come_first() -> None:
    score_OI = torch.tensor([[1.0, 2, 1, 9, 1, 5, 1, 1]])
    mask_OI = torch.tensor([[True, False] * 4])
    rebuilt = rebuild_masks([score_OI], [mask_OI], NM(1, 2), "row", float(Fraction(2, 3)))[0]
    assert rebuilt.tolist() == [[True, False, False, True, False, True, True, False]]


def test_groups_never_lose_score_where_the_released_rule_does() -> None:
    # A threshold over the row with an exchange within the group replaced 8 and 9 by less.
    score_OI = torch.tensor([[10, 9, 8, 7.5, 1, 2, 0.1, 0.2]])
    mask_OI = torch.tensor([[True, True, False, False] * 2])
    for ratio in (0.5, 1.0):
        rebuilt = rebuild_masks([score_OI], [mask_OI], NM(2, 4), "row", ratio)[0]
        assert torch.equal(rebuilt, mask_OI)


def test_masks_follow_a_permutation_and_not_the_scale() -> None:
    scores, masks = part(3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain = rebuild_masks(scores[:2], masks[:2], ANY, "block", 0.5)
    permuted = rebuild_masks(
        [7 * score_OI[:, order] for score_OI in scores[:2]],
        [mask_OI[:, order] for mask_OI in masks[:2]],
        ANY,
        "block",
        0.5,
    )
    assert all(torch.equal(a[:, order], b) for a, b in zip(plain, permuted, strict=True))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SecateurError, match="scores"):
        rebuild_masks([torch.full((2, 4), torch.nan)], [torch.ones(2, 4) > 0], ANY, "row", 1)


def test_the_score_is_magnitude_times_root_mean_square() -> None:
    score_OI = barber_score(torch.tensor([[-2.0, 3.0]]), torch.tensor([[9.0, 0.0]]))
    assert score_OI.tolist() == [[6, 0]]
