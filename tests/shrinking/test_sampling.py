"""Masks: pairs that partition the candidates, weighted, without replacement."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.shrinking.sampling import (
    Trial,
    draw_masks,
    lowest,
    sample_without_replacement,
    sampling_weights,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    masks=st.integers(2, 9),
    seed=st.integers(0, 100),
)
def test_pairs_partition_the_candidates_of_every_sub_block(
    sizes: list[int], masks: int, seed: int
) -> None:
    trials = [Trial(size, (size + 1) // 2) for size in sizes]
    weights = [torch.rand(size, generator=generator(seed)) for size in sizes]
    kept_NM = draw_masks(weights, trials, masks, generator(seed))
    assert kept_NM.shape == (masks, sum(sizes))
    for first_M, second_M in zip(kept_NM[::2], kept_NM[1::2], strict=False):
        assert torch.equal(first_M, ~second_M)
    for mask_M in kept_NM:
        for part, trial in zip(mask_M.split(sizes), trials, strict=True):
            assert int((~part).sum()) in (trial.drawn, trial.candidates - trial.drawn)


def test_complements_give_no_new_direction() -> None:
    trials = [Trial(30, 15), Trial(20, 10)]
    weights = [torch.rand(30), torch.rand(20)]
    design_NM = draw_masks(weights, trials, 16, generator()).double()
    assert torch.linalg.matrix_rank(design_NM - design_NM.mean(0)) == 8
    assert torch.linalg.matrix_rank(design_NM[::2] - design_NM[::2].mean(0)) == 7


def test_draws_follow_their_weights() -> None:
    weight_C = torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen_DC = sample_without_replacement(weight_C, 1, 20_000, generator())
    torch.testing.assert_close(
        chosen_DC.double().mean(0), weight_C.double() / 10, atol=0.015, rtol=0
    )


def test_second_draws_are_those_of_an_urn_without_the_first() -> None:
    weight_C = torch.tensor([1.0, 2.0, 5.0])
    chosen_DC = sample_without_replacement(weight_C, 2, 20_000, generator())
    p = weight_C / 8
    left_out = 1 - chosen_DC.double().mean(0)
    # The first candidate stays if the two others are drawn, in either order.
    expected = p[1] * p[2] / (1 - p[1]) + p[2] * p[1] / (1 - p[2])
    assert abs(left_out[0] - expected) < 0.015


def test_equal_priors_can_all_be_drawn() -> None:
    prior_U = torch.zeros(6)
    weight_C = sampling_weights(prior_U, lowest(prior_U, 4))
    chosen_DC = sample_without_replacement(weight_C, 2, 500, generator())
    assert bool(chosen_DC.any(0).all())
    assert chosen_DC.sum(1).eq(2).all()


def test_one_unit_alone_is_no_special_case() -> None:
    prior_U = torch.tensor([0.7])
    weight_C = sampling_weights(prior_U, lowest(prior_U, 1))
    kept_NM = draw_masks([weight_C], [Trial(1, 1)], 2, generator())
    assert sorted(kept_NM.tolist()) == [[False], [True]]


def test_single_candidates_of_several_sub_blocks_can_be_told_apart() -> None:
    # Grouped queries often leave one group of a few as the only candidate of its block.
    trials = [Trial(1, 1)] * 8
    weights = [torch.ones(1)] * 8
    design_NM = draw_masks(weights, trials, 64, generator()).double()
    assert torch.linalg.matrix_rank(design_NM - design_NM.mean(0)) == 8
    # Neither mask of a pair is the poorer one.
    assert abs(float(design_NM[::2].mean()) - 0.5) < 0.1


def test_lowest_come_first_and_ties_go_by_position() -> None:
    assert lowest(torch.tensor([2.0, 1.0, 0.5, 1.0]), 3).tolist() == [2, 1, 3]
