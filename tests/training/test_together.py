"""One threshold for all linears: the lowest scores of the model, and exactly so many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.training.together import keep_highest_together

_SHAPES = ((3, 8), (5, 4), (2, 16))


def removed(scores: list[torch.Tensor], zeros: int) -> torch.Tensor:
    made = keep_highest_together([lambda score=score: score for score in scores], zeros)
    return torch.cat([~mask.flatten() for mask in made])


@given(st.integers(0, 10_000), st.integers(0, 75), st.sampled_from([1, 3, 10**6]))
def test_the_lowest_of_all_go(seed: int, zeros: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # With few values most scores are equal, zeros among them.
    scores = [torch.randint(0, values + 1, shape, generator=generator) * 1e-7 for shape in _SHAPES]
    order = torch.cat([score.flatten() for score in scores]).argsort(stable=True)
    expected = torch.zeros(76, dtype=torch.bool)
    expected[order[:zeros]] = True
    assert torch.equal(removed(scores, zeros), expected)


def test_scores_of_any_size() -> None:
    scores = [torch.tensor([[0.0, 1e-45, 1e-38, torch.inf]]), torch.tensor([[1e30, 1e-20]])]
    expected = [True, True, True, False, False, True]
    assert removed(scores, 4).tolist() == expected


def test_nan_is_refused() -> None:
    with pytest.raises(SecateurError, match="NaN"):
        removed([torch.tensor([[1.0, torch.nan]])], 1)
