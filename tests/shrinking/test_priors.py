"""Priors against their formulas, on what output linears really receive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.models.structure import find_blocks
from secateur.shrinking.masking import narrowed
from secateur.shrinking.priors import (
    InputMoments,
    Prior,
    observed_moments,
    output_weight,
    score_units,
)
from secateur.shrinking.units import all_units, find_sub_blocks

GENERATOR = torch.Generator().manual_seed(0)


def moments_of(x_NI: Tensor) -> InputMoments:
    return InputMoments(x_NI.abs().mean(0), x_NI.mean(0), x_NI.square().mean(0))


def brute_force(prior: Prior, x_NI: Tensor, w_OI: Tensor, columns: list[int]) -> float:
    scores = []
    for j in columns:
        column, inputs = w_OI[:, j].double(), x_NI[:, j].double()
        scores.append(
            {
                "wanda": column.abs().mean() * inputs.square().mean().sqrt(),
                "magnitude": inputs.abs().mean(),
                "fluctuation": inputs.var(correction=0) * column.square().sum(),
            }[prior]
        )
    return float(sum(scores)) / len(scores)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("prior", ["wanda", "magnitude", "fluctuation"])
def test_priors_equal_their_formulas(prior: Prior, columns: int) -> None:
    x_NI = torch.randn(50, 12) + 0.5
    w_OI = torch.randn(5, 12)
    units = 12 // columns
    score_U = score_units(prior, moments_of(x_NI), w_OI, columns, GENERATOR)
    for unit in range(units):
        own = list(range(unit * columns, (unit + 1) * columns))
        assert score_U[unit] == pytest.approx(brute_force(prior, x_NI, w_OI, own), rel=1e-4)


@pytest.mark.parametrize("prior", ["wanda", "magnitude", "fluctuation"])
def test_priors_follow_a_permutation_of_the_units(prior: Prior) -> None:
    x_NI, w_OI, order = torch.randn(50, 9), torch.randn(4, 9), torch.randperm(9)
    score_U = score_units(prior, moments_of(x_NI), w_OI, 1, GENERATOR)
    permuted_U = score_units(prior, moments_of(x_NI[:, order]), w_OI[:, order], 1, GENERATOR)
    torch.testing.assert_close(permuted_U, score_U[order])


def test_priors_that_are_not_finite_suspect_all_units_alike() -> None:
    x_NI = torch.randn(20, 3)
    x_NI[0, 1] = float("inf")
    score_U = score_units("wanda", moments_of(x_NI), torch.randn(4, 3), 1, GENERATOR)
    assert score_U.tolist() == [0.0, 0.0, 0.0]


def test_random_priors_come_from_the_generator() -> None:
    moments, w_OI = moments_of(torch.randn(20, 3)), torch.randn(4, 3)
    first, second, third = (
        score_units("random", moments, w_OI, 1, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_observed_inputs_are_those_of_the_sub_model(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    kept = all_units(sub_blocks)
    kept[0], kept[3] = torch.arange(0), torch.tensor([1, 5, 40])
    seen: list[Tensor] = []
    ids = torch.arange(4, 36).view(2, 16)
    with torch.no_grad(), narrowed(blocks, sub_blocks, kept):
        output = blocks[1].get_submodule(sub_blocks[3].output)
        handle = output.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        with observed_moments(blocks, sub_blocks) as moments:
            model(ids)
        handle.remove()
    found = moments()
    x_NI = seen[0].flatten(0, 1)
    assert len(found[0].mean_I) == 0
    torch.testing.assert_close(found[3].mean_I, x_NI.mean(0))
    torch.testing.assert_close(found[3].square_I, x_NI.square().mean(0))
    assert output_weight(blocks, sub_blocks[3], kept[3]).shape == (32, 3)
    nothing_OI = output_weight(blocks, sub_blocks[0], kept[0])
    assert score_units("wanda", found[0], nothing_OI, 8, GENERATOR).shape == (0,)
