"""Marking the smallest numbers piece by piece, against a stable sort of all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.solvers.pieces import smallest


@settings(max_examples=50)
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


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 60), st.integers(1, 4))
def test_processes_with_a_part_of_each_piece_mark_what_one_would(
    seed: int, count: int, world: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 5, (60,), generator=generator).float()
    pieces = [part.view(-1, 5) for part in numbers.split([20, 5, 35])]
    told: list[Tensor] = [torch.empty(0)] * world
    meeting = Barrier(world)

    def process(rank: int) -> list[Tensor]:
        def gather(counts_N: Tensor) -> Tensor:
            told[rank] = counts_N
            meeting.wait(60)
            together = torch.stack(told)
            meeting.wait(60)
            return together

        # As a matrix with fewer rows than processes is divided, some have nothing of a piece.
        parts = [piece.tensor_split(world)[rank] for piece in pieces]
        return list(smallest(lambda: parts, count, gather=gather, rank=rank))

    with ThreadPoolExecutor(world) as executor:
        marked = list(executor.map(process, range(world)))
    for index, expected in enumerate(smallest(lambda: pieces, count)):
        assert torch.equal(torch.cat([parts[index] for parts in marked]), expected)
