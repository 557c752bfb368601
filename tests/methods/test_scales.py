"""Training the scales of quantised weights on single blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from methods.blocks import block_task
from secateur.blocks.tasks import BlockTask, Quantization
from secateur.methods.rows import uniform_masks
from secateur.methods.scales import Scales
from secateur.solvers.grids import GridOptions, QuantizedSolution, make_grid, round_to_grid

FAMILIES = ("llama", "gpt2", "mixtral")


@contextmanager
def quantised_task(
    folder: Path, stored: torch.dtype = torch.float32, *, symmetric: bool = True, bits: int = 3
) -> Iterator[BlockTask]:
    """A pruned block on a grid of few bits."""
    with block_task(folder, stored) as task:
        task.masks.update(uniform_masks(task))
        grids = task.quantization = Quantization(GridOptions(bits, 16, symmetric), False)
        for linear in task.linears:
            mask_OI = task.masks[linear.name]
            grid = make_grid(linear.weight_OI, mask_OI, grids.grid, stored=stored)
            solution = round_to_grid(linear.weight_OI, mask_OI, grid)
            grids.solutions[linear.name] = solution
            linear.weight_OI.copy_(solution.w_OI)
        yield task


def stage(**options: float) -> Scales:
    return Scales(reference="pruned", batch_sequences=2, epochs=3, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("symmetric", "bits"), [(True, 3), (False, 3), (False, 8)])
def test_integers_stay_and_weights_are_those_of_the_new_scales(
    family: str,
    stored: torch.dtype,
    symmetric: bool,
    bits: int,
    checkpoints: Callable[..., Path],
) -> None:
    with quantised_task(checkpoints(family), stored, symmetric=symmetric, bits=bits) as task:
        before = dict(solutions_of(task))
        stage().apply(task)
        for linear in task.linears:
            found, was = solutions_of(task)[linear.name], before[linear.name]
            assert torch.equal(found.level_OI, was.level_OI)
            assert torch.equal(found.grid.zero_OG, was.grid.zero_OG)
            scale_OG = found.grid.scale_OG
            assert torch.equal(scale_OG.to(stored).to(scale_OG.dtype), scale_OG)
            assert (scale_OG > 0).all()
            assert torch.equal(linear.weight_OI, found.w_OI.to(stored).to(scale_OG.dtype))
            assert not linear.weight_OI[~task.masks[linear.name]].any()
            assert not linear.weight_OI.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_comes_closer(family: str, checkpoints: Callable[..., Path]) -> None:
    with quantised_task(checkpoints(family)) as task:
        before, scales = task.held_out_error(), scales_of(solutions_of(task))
        stage().apply(task)
        assert task.held_out_error() < before
        assert not torch.equal(scales_of(solutions_of(task)), scales)


def test_what_held_out_text_rejects_is_undone(checkpoints: Callable[..., Path]) -> None:
    with quantised_task(checkpoints()) as task:
        state = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
        before = dict(solutions_of(task))
        stage(learning_rate=0.5).apply(task)
        assert task.notes and "rejected" in task.notes[-1]
        assert solutions_of(task) == before
        for name, tensor in task.block.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_vectors_stay_if_told_to(checkpoints: Callable[..., Path]) -> None:
    with quantised_task(checkpoints()) as task:
        vectors = [p.detach().clone() for p in task.block.parameters() if p.ndim == 1]
        stage(vectors=False).apply(task)
        after = [p for p in task.block.parameters() if p.ndim == 1]
        assert all(torch.equal(old, new) for old, new in zip(vectors, after, strict=True))


def solutions_of(task: BlockTask) -> dict[str, QuantizedSolution]:
    assert task.quantization is not None
    return task.quantization.solutions


def scales_of(quantised: dict[str, QuantizedSolution]) -> torch.Tensor:
    return torch.cat([each.grid.scale_OG.flatten() for each in quantised.values()])
