"""Quantising stages on single groups and blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from blocks.test_tasks import inputs, make_task
from methods.blocks import block_task
from secateur.blocks.tasks import GroupTask, InputStatistics, Quantization
from secateur.methods.besa import BESA, LearnedClipping
from secateur.methods.quantize import Quantize
from secateur.methods.refit import Refit
from secateur.methods.rows import uniform_masks, write_rounded
from secateur.methods.wanda import Wanda
from secateur.patterns.pattern import parse_pattern
from secateur.solvers.block_loss import relative_loss
from secateur.solvers.grids import Clipping, GridOptions


def pruned_task(pattern: str = "0.5", fitted_NI: Tensor | None = None) -> GroupTask:
    task = make_task(parse_pattern(pattern), fitted_NI)
    Wanda().apply(task)
    Refit().apply(task)
    return task


def moved(stage: Quantize, task: GroupTask) -> list[float]:
    before_OI = task.w_OI.clone()
    stage.apply(task)
    return task.held_out_errors(task.w_OI, before_OI)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_moves_held_out_outputs_less_than_rounding(
    bits: Literal[3, 4, 8], symmetric: bool
) -> None:
    errors = {
        solver: moved(
            Quantize(bits=bits, group=16, symmetric=symmetric, solver=solver), pruned_task()
        )
        for solver in ("feedback", "round")
    }
    assert all(new < old for new, old in zip(errors["feedback"], errors["round"], strict=True))


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0"])
@pytest.mark.parametrize("solver", ["feedback", "round"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_weights_are_levels_of_the_grid(
    pattern: str, solver: Literal["feedback", "round"], stored: torch.dtype
) -> None:
    task = pruned_task(pattern)
    task.stored = stored
    mask_OI = task.mask_OI
    assert mask_OI is not None
    before_OI = mask_OI.clone()
    Quantize(bits=4, group=8, solver=solver, symmetric=False).apply(task)
    assert torch.equal(task.mask_OI, before_OI)  # type: ignore[arg-type]
    assert not task.w_OI[~mask_OI].any()
    assert task.quantized is not None
    assert torch.equal(task.quantized.w_OI, task.w_OI)
    scale_OG = task.quantized.grid.scale_OG
    assert torch.equal(scale_OG, scale_OG.to(stored).float())


def test_a_solution_that_does_not_carry_over_is_refused_and_noted() -> None:
    # Fitted to two tokens that look like nothing else.
    task = pruned_task()
    x_NI = torch.randn(2, task.w_OI.shape[1]) * 100
    gram_II = x_NI.T @ x_NI / 2
    task.statistics = InputStatistics(2, gram_II.diagonal().clone(), gram_II)
    Quantize(bits=8, group=16, damping=1e-9).apply(task)
    assert any("rounded without feedback" in note for note in task.notes)


def test_linears_that_no_token_reached_are_rounded() -> None:
    task = pruned_task()
    rounded = pruned_task()
    task.statistics = InputStatistics(0, torch.zeros(task.w_OI.shape[1]), None)
    Quantize(group=16).apply(task)
    Quantize(group=16, solver="round").apply(rounded)
    assert torch.equal(task.w_OI, rounded.w_OI)


def test_learned_clipping_comes_before_a_searched_one() -> None:
    task = pruned_task()
    options = GridOptions(4, 16, True)
    half_OG = Clipping.none(task.w_OI, options).lower_OG / 2
    task.clipping = Clipping(half_OG, half_OG)
    whole = pruned_task()
    for each in (task, whole):
        Quantize(group=16, solver="round").apply(each)
    assert task.quantized is not None and whole.quantized is not None
    torch.testing.assert_close(task.quantized.grid.scale_OG * 2, whole.quantized.grid.scale_OG)


@pytest.mark.parametrize("symmetric", [True, False])
def test_besa_learns_clipping_along_with_its_rates(
    symmetric: bool, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints()) as task:
        task.quantization = Quantization(GridOptions(3, 16, symmetric), rounds_to_nearest=True)
        stage = BESA(epochs=2)
        masks, clippings = stage._learn(task)
        assert sum(int((~each).sum()) for each in masks.values()) == sum(task.zeros.values())
        for linear in task.linears:
            clipping = clippings[linear.name]
            for strength_OG in (clipping.lower_OG, clipping.upper_OG):
                assert ((strength_OG > 0) & (strength_OG < 1)).all()
                assert not strength_OG.requires_grad
            assert len(clipping.lower_OG.unique()) > 1


def test_besa_takes_what_is_best_on_the_grid(checkpoints: Callable[..., Path]) -> None:
    with block_task(checkpoints()) as task:
        task.quantization = Quantization(GridOptions(3, 16, True), rounds_to_nearest=False)
        BESA(clip_rate=0.05).apply(task)
        uniform = uniform_masks(task)
        for linear in task.linears:
            # The weights themselves are left for the stage that quantises.
            dense_OI, mask_OI = task.dense[linear.name], task.masks[linear.name]
            assert torch.equal(linear.weight_OI, dense_OI * mask_OI)
        write_rounded(task, task.masks, task.quantization.clippings)
        found = task.held_out_error()
        write_rounded(task, uniform, {})
        assert found <= task.held_out_error()
        assert "uniform rates and clipping" in task.notes[-1]
        assert "learned rates and clipping" in task.notes[-1]


@pytest.mark.parametrize(("clip_rate", "solver"), [(0.0, "round"), (None, "feedback")])
def test_besa_without_a_clipping_rate_is_as_if_nothing_were_quantised(
    clip_rate: float | None, solver: Literal["round", "feedback"], checkpoints: Callable[..., Path]
) -> None:
    masks = []
    quantization = Quantization(GridOptions(3, 16, True), rounds_to_nearest=solver == "round")
    for task_quantization in (None, quantization):
        with block_task(checkpoints()) as task:
            task.quantization = task_quantization
            BESA(clip_rate=clip_rate).apply(task)
            assert not quantization.clippings
            masks.append(task.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_strengths_follow_the_gradient_of_the_loss() -> None:
    """Adam on the strengths alone lowers what rounding costs."""
    x_NI = inputs(64, 3).clone()
    w_OI = torch.randn(8, x_NI.shape[1], generator=torch.Generator().manual_seed(1))
    # A weight that widens the range of its row for an input that hardly matters.
    w_OI[:, 0] = 4
    x_NI[:, 0] *= 0.05
    mask_OI = torch.rand(w_OI.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    learned = LearnedClipping(w_OI, GridOptions(3, 0, False), torch.float32)
    optimiser = torch.optim.Adam(learned.logits, lr=0.1)
    losses = []
    for _ in range(40):
        output_NO = x_NI @ (learned.on_grid(w_OI, mask_OI) * mask_OI).T
        loss = relative_loss(output_NO, x_NI @ (w_OI * mask_OI).T)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert min(losses[-5:]) < losses[0] * 0.95
