"""Sub-models of random widths: which widths each has, and how far it is from the dense model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.blocks.capture import logits_after
from secateur.blocks.precision import forward_precision
from secateur.evaluation.predictions import Predictions
from secateur.models.structure import BlockList

# Widths between none and all that sub-models have; each takes a refit of its own.
_RUNGS = 8
# How often a whole sub-block is missing.
_GONE = 1 / 24
# Logits that exist at one time.
_LOGITS = 2**23


def draw_widths(
    costs: Sequence[Sequence[int]], sparsities: Sequence[float], generator: torch.Generator
) -> list[list[int]]:
    """Draw the width that each sub-model has in each sub-block.

    A sub-block loses between nothing and twice the sub-model's sparsity, or all of it now and
    then. Draws are stratified: over the sub-models every sub-block goes evenly through its range,
    independently of the others (a Latin hypercube).

    Args:
        costs: parameters of the widths that each sub-block may have, rising from none to all.
        sparsities: mean share of parameters that each sub-model loses.
        generator: of the random choices.

    Returns:
        one list per sub-model, of places in the costs of each sub-block.
    """
    columns = []
    for cost in costs:
        rungs_R = torch.tensor(_rungs(len(cost)))
        cost_R = torch.tensor(cost)[rungs_R]
        removed_N, gone_N = _strata(len(sparsities), generator), _strata(len(sparsities), generator)
        mean_N = torch.tensor(sparsities, dtype=torch.float64)
        # Around a mean above one half the range ends at all of it and begins later.
        reach_N = torch.minimum(mean_N, 1 - mean_N)
        wanted_N = (1 - mean_N + reach_N * (1 - 2 * removed_N)) * cost[-1]
        width_N = rungs_R[(wanted_N[:, None] - cost_R).abs().argmin(1)]
        columns.append(width_N.masked_fill(gone_N < _GONE, 0).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def _rungs(count: int) -> list[int]:
    """At most so many places of a grid, evenly spread, its ends among them."""
    steps = min(_RUNGS, count - 1)
    return [round(number * (count - 1) / steps) for number in range(steps + 1)]


def _strata(count: int, generator: torch.Generator) -> Tensor:
    """The middles of ``count`` equal parts of [0, 1) in random order, float64."""
    return (torch.randperm(count, generator=generator).double() + 0.5) / count


@torch.no_grad()
def divergences(
    blocks: BlockList,
    tokens_WL: Tensor,
    dense_WLD: Tensor,
    states_NWLD: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """Mean KL(dense ‖ sub-model) in nats per token; infinite for a sub-model that fell apart.

    Args:
        blocks: the model, whose head has weights.
        tokens_WL: int64 (windows, length), the text.
        dense_WLD: what the last dense block returns on it.
        states_NWLD: what the last block of each sub-model returns, in any dtype.
        device: where the head runs.
        dtype: of forward passes.
    """
    total_N = torch.zeros(len(states_NWLD), dtype=torch.float64)
    step = max(1, _LOGITS // blocks.model.config.get_text_config().vocab_size)

    def predictions(ids_1P: Tensor, states_PD: Tensor) -> Predictions:
        with forward_precision(dtype, device):
            logits_1PV = logits_after(blocks, ids_1P, states_PD[None].to(device, torch.float32))
        return Predictions(logits_1PV[0].float())

    for window, ids_L in enumerate(tokens_WL):
        for start in range(0, len(ids_L), step):
            at = slice(start, start + step)
            ids_1P = ids_L[None, at].to(device, torch.long)
            dense = predictions(ids_1P, dense_WLD[window, at])
            for number, states_WLD in enumerate(states_NWLD):
                pruned = predictions(ids_1P, states_WLD[window, at])
                total_N[number] += dense.divergence(pruned).double().sum().cpu()
    mean_N = total_N / tokens_WL.numel()
    return [float(value) for value in mean_N.nan_to_num(nan=torch.inf, posinf=torch.inf)]
