"""Stages that work on a block as a whole: exact zeros, and no block gets worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from methods.blocks import SPARSITY, block_task
from secateur.blocks.tasks import BlockTask
from secateur.methods import BlockStage
from secateur.methods.besa import BESA
from secateur.methods.besa_rates import BESARates
from secateur.methods.besa_reconstruct import BESAReconstruct
from secateur.methods.descent import one_cycle
from secateur.methods.reconstruct import Reconstruct
from secateur.patterns.pattern import Budget, select
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from secateur.solvers.scores import wanda_score
from tiny import FAMILIES


def prune_at_random(task: BlockTask) -> None:
    generator = torch.Generator().manual_seed(5)
    for linear in task.linears:
        mask_OI = torch.rand(linear.weight_OI.shape, generator=generator) > 0.5
        task.masks[linear.name] = mask_OI
        linear.weight_OI.mul_(mask_OI)


def zeros_of(task: BlockTask) -> int:
    return sum(int((linear.weight_OI == 0).sum()) for linear in task.linears)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["block", "parts"])
def test_reconstruction_lowers_the_error_and_keeps_every_zero(
    family: str,
    stored: torch.dtype,
    window: Literal["block", "parts"],
    checkpoints: Callable[..., Path],
) -> None:
    with block_task(checkpoints(family), stored) as task:
        prune_at_random(task)
        before = task.held_out_error()
        stage = Reconstruct(
            reference="pruned", window=window, epochs=6, learning_rate=0.03, batch_sequences=2
        )
        stage.apply(task)
        assert task.held_out_error() < before
        for linear in task.linears:
            assert not linear.weight_OI[~task.masks[linear.name]].any()
            assert torch.equal(linear.weight_OI, linear.weight_OI.to(stored).float())
        assert not any(p.requires_grad or p.grad is not None for p in task.block.parameters())


def test_a_reconstruction_that_makes_things_worse_is_undone(
    checkpoints: Callable[..., Path],
) -> None:
    with block_task(checkpoints("llama")) as task:
        prune_at_random(task)
        before = [parameter.clone() for parameter in task.block.parameters()]
        Reconstruct(reference="pruned", epochs=1, learning_rate=100.0).apply(task)
        assert all(map(torch.equal, before, task.block.parameters()))
        assert "reconstruct rejected" in task.notes[0]


def test_vectors_stay_when_asked(checkpoints: Callable[..., Path]) -> None:
    with block_task(checkpoints("qwen2")) as task:
        prune_at_random(task)
        vectors = [p.clone() for p in task.block.parameters() if p.ndim == 1]
        Reconstruct(reference="pruned", epochs=1, vectors=False).apply(task)
        after = [p for p in task.block.parameters() if p.ndim == 1]
        assert all(map(torch.equal, vectors, after))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "stage",
    [
        BESARates(steps=0, batch_sequences=2, probe_sequences=4),
        BESARates(steps=6, batch_sequences=2, probe_sequences=4),
        BESA(epochs=2),
        BESA(scope="linear"),
        BESA(parameterisation="paper", loss="feature", optimiser="prodigy"),
    ],
    ids=["closed form", "steps", "besa", "besa by linear", "besa as released"],
)
def test_rates_meet_the_budget_and_never_lose_to_uniform_wanda(
    family: str, stage: BlockStage, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints(family)) as task:
        weights = sum(dense.numel() for dense in task.dense.values())
        stage.apply(task)
        found = task.held_out_error()
        zeros = sum(task.zeros.values())
        assert zeros_of(task) == zeros
        assert abs(zeros - SPARSITY * weights) < len(task.linears)
        for linear in task.linears:
            dense_OI, mask_OI = task.dense[linear.name], task.masks[linear.name]
            assert torch.equal(linear.weight_OI, dense_OI * mask_OI)
            # In each row the weights removed are those of the lowest Wanda score.
            score_OI = wanda_score(dense_OI, task.mean_squares[linear.name])
            removed_O = score_OI.masked_fill(mask_OI, 0).amax(1)
            kept_O = score_OI.masked_fill(~mask_OI, torch.inf).amin(1)
            assert (removed_O <= kept_O * (1 + 1e-5)).all()
        for name, dense_OI in task.dense.items():
            budget = Budget(task.pattern, (len(dense_OI),), (task.zeros[name],))
            mask_OI = select(wanda_score(dense_OI, task.mean_squares[name]), budget)
            module = next(linear for linear in task.linears if linear.name == name)
            module.weight_OI.copy_(dense_OI * mask_OI)
        assert found <= task.held_out_error()


@pytest.mark.parametrize(
    "stage",
    [
        BESARates(steps=2, probe_sequences=4),
        BESAReconstruct(reference="pruned", probe_sequences=4),
        BESA(),
    ],
)
def test_a_linear_that_no_token_reached_keeps_its_even_rates(
    stage: BlockStage, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints("llama")) as task:
        idle = task.linears[-1].name
        task.mean_squares = {
            name: torch.zeros_like(square_I) if name == idle else square_I
            for name, square_I in task.mean_squares.items()
        }
        stage.apply(task)
        assert zeros_of(task) == sum(task.zeros.values())
        removed = int((~task.masks[idle]).sum())
        if not isinstance(stage, BESA):
            assert removed == task.zeros[idle]
        assert 0 < removed < task.masks[idle].numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_rates_and_weights_learned_together_meet_the_budget_and_lose_nothing(
    family: str, stored: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints(family), stored) as task:
        BESARates(steps=0, probe_sequences=4).apply(task)
        before = task.held_out_error()
        BESAReconstruct(
            reference="pruned", probe_sequences=4, epochs=10, rate=0.1, batch_sequences=2
        ).apply(task)
        if family in ("llama", "gpt2", "opt"):
            assert not any("rejected" in note for note in task.notes)
            assert task.held_out_error() < before
        assert task.held_out_error() <= before
        removed = sum(int((~mask_OI).sum()) for mask_OI in task.masks.values())
        assert removed == sum(task.zeros.values())
        for linear in task.linears:
            assert not linear.weight_OI[~task.masks[linear.name]].any()
            assert torch.equal(linear.weight_OI, linear.weight_OI.to(stored).float())
        assert not any(p.requires_grad or p.grad is not None for p in task.block.parameters())


def test_weights_that_training_makes_worse_stay_dense_with_the_better_rates(
    checkpoints: Callable[..., Path],
) -> None:
    with block_task(checkpoints("opt")) as task:
        vectors = [p.clone() for p in task.block.parameters() if p.ndim == 1]
        BESAReconstruct(reference="pruned", probe_sequences=4, learning_rate=100.0).apply(task)
        assert "besa-reconstruct rejected" in task.notes[-1]
        for linear in task.linears:
            kept_OI = task.dense[linear.name] * task.masks[linear.name]
            assert torch.equal(linear.weight_OI, kept_OI)
        after = [p for p in task.block.parameters() if p.ndim == 1]
        assert all(map(torch.equal, vectors, after))


def test_a_sparsity_that_the_released_parameterisation_cannot_reach_is_refused() -> None:
    stage = {"method": "besa", "parameterisation": "paper"}
    Recipe.from_mapping({"pattern": 0.6, "stages": [stage]})
    with pytest.raises(SecateurError, match=r"reaches sparsities from 0.376 to 0.624, not 0.7"):
        Recipe.from_mapping({"pattern": 0.7, "stages": [stage]})
    Recipe.from_mapping({"pattern": 0.7, "stages": [{"method": "besa"}]})


def test_learning_rate_rises_then_falls() -> None:
    shares = [one_cycle(step, 50) for step in range(50)]
    assert max(shares) == 1
    assert shares.index(1) == 4
    assert shares[-1] < 0.12
    assert min(shares) > 0


@pytest.mark.parametrize("method", ["besa", "barber"])
def test_the_option_granularity_still_says_the_scope(method: str) -> None:
    stages = [{"method": "wanda"}, {"method": method, "granularity": "linear"}]
    recipe = Recipe.from_mapping({"stages": stages})
    assert recipe.model_dump()["stages"][1]["scope"] == "linear"
