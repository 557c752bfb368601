"""What methods share: acceptance on held-out tokens, exact masks, any stage after any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.blocks.tasks import GroupTask, InputStatistics
from secateur.methods.admm import ADMM
from secateur.methods.refit import Refit
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.patterns.pattern import Budget, Pattern, check_mask, parse_pattern, select

WIDTH = 32
ROWS = (12, 8)


def inputs(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, WIDTH, generator=generator) @ mixing


def make_task(pattern: Pattern, fitted_NI: Tensor | None = None) -> GroupTask:
    fitted_NI = inputs(400, 1) if fitted_NI is None else fitted_NI
    gram_II = fitted_NI.T @ fitted_NI / len(fitted_NI)
    dense_OI = torch.randn(sum(ROWS), WIDTH, generator=torch.Generator().manual_seed(0))
    return GroupTask(
        names=("first", "second"),
        dense_OI=dense_OI,
        w_OI=dense_OI.clone(),
        budget=Budget.uniform(pattern, ROWS, WIDTH),
        statistics=InputStatistics(len(fitted_NI), gram_II.diagonal().clone(), gram_II),
        held_out_NI=inputs(200, 2),
    )


def test_refit_lowers_the_held_out_error() -> None:
    task = make_task(parse_pattern("0.5"))
    Wanda().apply(task)
    before = task.held_out_errors(task.w_OI)
    Refit().apply(task)
    after = task.held_out_errors(task.w_OI)
    assert all(new < old for new, old in zip(after, before, strict=True))


def test_refit_that_does_not_carry_over_is_refused_and_noted() -> None:
    # Fitted to eight tokens that look like nothing else.
    task = make_task(parse_pattern("0.5"), torch.randn(8, WIDTH) * 100)
    Wanda().apply(task)
    masked_OI = task.w_OI.clone()
    Refit(damping=1e-9, iterations=200).apply(task)
    assert torch.equal(task.w_OI, masked_OI)
    assert [note.partition(":")[0] for note in task.notes] == ["first", "second"]
    assert all("refit rejected" in note for note in task.notes)


def test_held_out_error_is_that_of_the_outputs_in_float64() -> None:
    task = make_task(parse_pattern("0.5"))
    Wanda().apply(task)
    x_NI, dense_OI, w_OI = (t.double() for t in (task.held_out_NI, task.dense_OI, task.w_OI))
    for rows, error in zip(task.row_slices(), task.held_out_errors(task.w_OI), strict=True):
        change = (x_NI @ (w_OI[rows] - dense_OI[rows]).T).square().sum()
        power = (x_NI @ dense_OI[rows].T).square().sum()
        assert error == pytest.approx(float(change / power), rel=1e-4)


def test_admm_searches_within_the_rows_that_a_stage_before_has_chosen() -> None:
    task = make_task(parse_pattern("0.5"))
    alone = make_task(parse_pattern("0.5"))
    generator = torch.Generator().manual_seed(0)
    score_OI = torch.rand(sum(ROWS), WIDTH, generator=generator)
    # Rows of very different sparsity, within the same budget.
    score_OI *= torch.linspace(0.3, 3, sum(ROWS))[:, None]
    task.mask_OI = select(score_OI, task.budget, "linear")
    before = task.mask_OI.sum(1)
    task.w_OI.mul_(task.mask_OI)
    ADMM().apply(task)
    ADMM().apply(alone)
    assert torch.equal(task.mask_OI.sum(1), before)
    assert not torch.equal(alone.mask_OI.sum(1), before)  # type: ignore[union-attr]
    check_mask(task.mask_OI, task.budget)
    assert torch.equal(task.w_OI != 0, task.mask_OI)


def test_a_mask_alone_leaves_kept_weights_as_they_were() -> None:
    whole, alone = (make_task(parse_pattern("0.5")) for _ in range(2))
    SparseGPT(refit_iterations=0).apply(whole)
    SparseGPT(mask_only=True).apply(alone)
    assert whole.mask_OI is not None and alone.mask_OI is not None
    assert torch.equal(alone.mask_OI, whole.mask_OI)
    assert torch.equal(alone.w_OI, alone.dense_OI * alone.mask_OI)
