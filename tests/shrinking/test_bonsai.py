"""Rounds on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.evaluation import scores
from secateur.models.structure import BlockList, find_blocks
from secateur.shrinking.bonsai import Parent, Round, RoundOptions, prune_round, remove
from secateur.shrinking.selection import Anywhere
from secateur.shrinking.units import SubBlock, all_units, find_sub_blocks, kept_parameters

WINDOWS = torch.randint(4, 260, (4, 24), generator=torch.Generator().manual_seed(0))
OPTIONS = RoundOptions(prior="wanda", masks=12, seed=0)


@pytest.fixture(scope="module")
def blocks(checkpoints: Callable[..., Path]) -> BlockList:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64)
    return find_blocks(model.eval())


def goal_of(sub_blocks: list[SubBlock], share: float) -> Anywhere:
    total = kept_parameters(sub_blocks, all_units(sub_blocks))
    return Anywhere(
        round(share * total),
        [each.units for each in sub_blocks],
        [each.unit_parameters for each in sub_blocks],
    )


def one_round(
    blocks: BlockList,
    *,
    number: int = 0,
    options: RoundOptions = OPTIONS,
    kept: list[Tensor] | None = None,
) -> Round:
    sub_blocks = find_sub_blocks(blocks)
    return prune_round(
        Parent(blocks, sub_blocks, torch.float32),
        kept or all_units(sub_blocks),
        goal_of(sub_blocks, 0.2),
        1.0,
        WINDOWS,
        number,
        options,
    )


def test_a_round_removes_its_budget(blocks: BlockList) -> None:
    sub_blocks = find_sub_blocks(blocks)
    found = one_round(blocks)
    kept = remove(all_units(sub_blocks), found.removed)
    budget = goal_of(sub_blocks, 0.2).budget
    gone = kept_parameters(sub_blocks, found.removed)
    assert budget - min(each.unit_parameters for each in sub_blocks) < gone <= budget
    assert [len(units) + len(left) for units, left in zip(found.removed, kept, strict=True)] == [
        each.units for each in sub_blocks
    ]
    assert found.tokens == 13 * WINDOWS.numel()


def test_a_seed_decides_everything_and_rounds_differ(blocks: BlockList) -> None:
    first, again, later = one_round(blocks), one_round(blocks), one_round(blocks, number=1)
    seeded = one_round(blocks, options=replace(OPTIONS, seed=1))
    assert first.utilities == again.utilities
    assert all(map(torch.equal, first.removed, again.removed))
    assert first.utilities != later.utilities
    assert first.utilities != seeded.utilities


def test_the_order_of_units_does_not_matter(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64).eval()
    first = one_round(find_blocks(model))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mlp = find_blocks(model)[1].get_submodule("mlp")
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight_OI = mlp.get_parameter(f"{name}.weight").data
        weight_OI.copy_(weight_OI.index_select(axis, order))
    again = one_round(find_blocks(model))
    assert again.utilities == pytest.approx(first.utilities, rel=1e-6)
    for place, (before, after) in enumerate(zip(first.removed, again.removed, strict=True)):
        found = order[after] if place == 3 else after
        assert set(found.tolist()) == set(before.tolist())


def test_batches_do_not_matter(blocks: BlockList, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = one_round(blocks)
    monkeypatch.setattr(scores, "_BATCH_TOKENS", 1)
    single = one_round(blocks)
    assert single.utilities == pytest.approx(whole.utilities, rel=1e-6)
    assert all(map(torch.equal, single.removed, whole.removed))


def test_rounds_go_on_when_sub_blocks_are_gone_or_down_to_one_unit(blocks: BlockList) -> None:
    sub_blocks = find_sub_blocks(blocks)
    kept = [torch.arange(each.units)[: number % 3] for number, each in enumerate(sub_blocks)]
    kept[1] = torch.arange(64)
    dense = [each.units for each in sub_blocks]
    gone = kept_parameters(sub_blocks, all_units(sub_blocks)) - kept_parameters(sub_blocks, kept)
    goal = Anywhere(gone + 900, dense, [each.unit_parameters for each in sub_blocks])
    found = prune_round(
        Parent(blocks, sub_blocks, torch.float32), kept, goal, 1.0, WINDOWS, 0, OPTIONS
    )
    for left, units in zip(kept, found.removed, strict=True):
        assert set(units.tolist()) <= set(left.tolist())
    left = kept_parameters(sub_blocks, kept) - kept_parameters(sub_blocks, found.removed)
    assert left < kept_parameters(sub_blocks, kept)


def test_sub_models_that_fall_apart_do_not_stop_a_round(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float64).eval()
    # Two channels cancel each other exactly; one without the other is beyond fp32.
    broken = find_blocks(model)
    mlp = broken[2].get_submodule("mlp")
    for name in ("gate_proj", "up_proj"):
        weight_OI = mlp.get_parameter(f"{name}.weight").data
        weight_OI[1] = weight_OI[0]
    down_OI = mlp.get_parameter("down_proj.weight").data
    down_OI[:, 0], down_OI[:, 1] = 2.0**600, -(2.0**600)
    found = one_round(broken, options=replace(OPTIONS, prior="random", seed=1))
    assert not torch.tensor(found.utilities).isfinite().all()
    assert all(value is None or value == value for value in found.coefficients)
