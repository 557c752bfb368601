"""Marking the smallest numbers piece by piece, against a stable sort of all."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.solvers.order import smallest


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 60), st.booleans())
def test_what_is_marked_is_what_a_stable_sort_puts_first(seed: int, count: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    if tied:
        numbers = torch.randint(0, 4, (60,), generator=generator).float()
    else:
        numbers = torch.randn(60, generator=generator).mul(20).exp()
    numbers[5], numbers[41] = 0.0, torch.inf
    pieces = [part.view(-1, 5) for part in numbers.split([20, 5, 35])]
    marked = torch.cat([part.flatten() for part in smallest(lambda: pieces, count)])
    expected = torch.zeros(60, dtype=torch.bool)
    expected[numbers.argsort(stable=True)[:count]] = True
    assert torch.equal(marked, expected)
