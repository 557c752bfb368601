"""Sub-models: some units of a model, the others left out; how to run, draw and compare them.

A sub-model has no weights of its own: ``narrowed`` cuts each block while it runs and puts the dense
weights back behind it, so it does less work than the model and only one block exists twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.blocks.precision import forward_precision
from secateur.blocks.streams import loaded
from secateur.evaluation.predictions import Predictions
from secateur.models.capture import capture, logits_after
from secateur.models.forwards import replaced_forwards
from secateur.models.store import BlockStore
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.runs.limits import LOGITS, rows_at_once
from secateur.runs.progress import Progress, silent
from secateur.shrinking.module_sizes import fit_attention, fit_linear
from secateur.shrinking.units import SubBlock, Width, attention_refused

# Another summation order changes fp32 sums by less than this; a wrong cut changes them by far more.
_TOLERANCE = 1e-3
_PROBE_TOKENS = 16
# Widths between none and all that sub-models have; each takes a refit of its own.
_RUNGS = 8
# How often a whole sub-block is missing.
_GONE = 1 / 24


@contextmanager
def cut_to(
    block: nn.Module, sub_block: SubBlock, kept: Tensor, new: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the context, a dense block has only the kept units of one sub-block.

    ``new`` are cut parameters with other values, by name inside the block; others are ignored.
    """
    width = sub_block.width_of(kept)
    if width == sub_block.whole:
        yield
        return
    dense = {axis.parameter: block.get_parameter(axis.parameter) for axis in sub_block.axes}
    small = sub_block.cut(dense, kept)
    small |= {name: tensor.to(small[name]) for name, tensor in (new or {}).items() if name in small}
    try:
        _install(block, sub_block, small, width)
        yield
    finally:
        _install(block, sub_block, dense, sub_block.whole)


def _install(
    block: nn.Module, sub_block: SubBlock, tensors: Mapping[str, Tensor], width: Width
) -> None:
    """Put parameters of a width into a block, and tell its modules how wide they are now."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        block.get_submodule(owner)._parameters[leaf] = tensor
    for name in {name.rpartition(".")[0] for name in tensors}:
        fit_linear(block.get_submodule(name))
    if sub_block.kind == "attention":
        fit_attention(
            block.get_submodule(sub_block.attention),
            block.get_submodule(sub_block.output),
            heads=width.units * width.queries,
            groups=width.units,
        )


@contextmanager
def narrowed(
    blocks: Sequence[nn.Module] | BlockList, sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor]
) -> Iterator[None]:
    """Within the context, blocks with dense weights run with the kept units alone."""

    def narrow(index: int, block: nn.Module) -> Callable[..., Any]:
        dense = block.forward
        cuts = [part for part in zip(sub_blocks, kept, strict=True) if part[0].block == index]

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for sub_block, units in cuts:
                    stack.enter_context(cut_to(block, sub_block, units))
                return dense(*args, **kwargs)

        return run

    with replaced_forwards((block, narrow(index, block)) for index, block in enumerate(blocks)):
        yield


@contextmanager
def masked(
    blocks: Sequence[nn.Module] | BlockList, sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor]
) -> Iterator[None]:
    """Within the context, what removed units hand to the output linear is multiplied by zero.

    This is the definition that ``narrowed`` is held to.
    """

    def masking(mask_I: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _module, inputs: (inputs[0] * mask_I.to(inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for sub_block, units in zip(sub_blocks, kept, strict=True):
            mask_I = torch.zeros(sub_block.columns_UP.numel())
            mask_I[sub_block.columns(units)] = 1
            output = blocks[sub_block.block].get_submodule(sub_block.output)
            stack.callback(output.register_forward_pre_hook(masking(mask_I)).remove)
        yield


@torch.no_grad()
def check_cuttable(
    store: BlockStore, sub_blocks: Sequence[SubBlock], *, queries: bool = True
) -> None:
    """Try on the first block whether cutting a unit equals masking it.

    Structure alone does not show everything: positions may be tied to the number of a head. With
    ``queries`` the same is tried for query heads that go without their groups.

    Raises:
        SecateurError: cutting changes what the kept units compute.
    """
    with store.embeddings():
        parameters = store.blocks.model.parameters()
        device = next(each.device for each in parameters if not each.is_meta)
        ids = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0)
        captured = capture(store.blocks, ids, last=0)
    call, x_BLD = captured.calls[0], captured.first_BLD

    def cut_is_masked(block: nn.Module, sub_block: SubBlock, kept: Tensor) -> bool:
        with masked([block], [sub_block], [kept]):
            expected_BLD = call(block, x_BLD)
        try:
            with cut_to(block, sub_block, kept):
                actual_BLD = call(block, x_BLD)
        except (RuntimeError, ValueError, TypeError):
            return False
        return bool((actual_BLD - expected_BLD).norm() < _TOLERANCE * expected_BLD.norm())

    with loaded(store, 0) as block:
        for sub_block in (each for each in sub_blocks if each.block == 0):
            if not cut_is_masked(block, sub_block, torch.arange(1, sub_block.units)):
                if sub_block.kind == "attention":
                    raise attention_refused("what one head computes depends on how many there are")
                raise SecateurError(
                    "The feed-forward of this family cannot be cut, what one channel computes "
                    "depends on the others."
                )
            groups, heads = sub_block.whole
            if queries and heads > 1:
                later = torch.arange(groups * heads).view(groups, heads)[:, 1:]
                if not cut_is_masked(block, sub_block, later):
                    raise SecateurError(
                        "The attention of this family cannot lose query heads alone, what one "
                        "computes depends on how many read the same keys; use --whole-groups."
                    )


def draw_widths(
    costs: Sequence[Sequence[int]], sparsities: Sequence[float], generator: torch.Generator
) -> list[list[int]]:
    """Draw the width of each sub-block for each sub-model, as places in ``costs``.

    A sub-block loses between nothing and twice the sub-model's sparsity, or all of it now and
    then. Draws are stratified: over the sub-models every sub-block goes evenly through its range,
    independently of the others (a Latin hypercube).

    Args:
        costs: parameters of the widths that each sub-block may have, rising from none to all.
        sparsities: mean share of parameters that each sub-model loses.
        generator: of the random choices.
    """
    columns = []
    for cost in costs:
        steps = min(_RUNGS, len(cost) - 1)
        rungs_R = torch.tensor([round(step * (len(cost) - 1) / steps) for step in range(steps + 1)])
        cost_R = torch.tensor(cost)[rungs_R]
        removed_N, gone_N = _strata(len(sparsities), generator), _strata(len(sparsities), generator)
        mean_N = torch.tensor(sparsities, dtype=torch.float64)
        # Around a mean above one half the range ends at all of it and begins later.
        reach_N = torch.minimum(mean_N, 1 - mean_N)
        wanted_N = (1 - mean_N + reach_N * (1 - 2 * removed_N)) * cost[-1]
        width_N = rungs_R[(wanted_N[:, None] - cost_R).abs().argmin(1)]
        columns.append(width_N.masked_fill(gone_N < _GONE, 0).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


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
    progress: Progress = silent,
) -> list[float]:
    """Mean KL(dense ‖ sub-model) in nats per token; infinite for a sub-model that fell apart.

    Args:
        blocks: the model, whose head has weights.
        tokens_WL: int64 (windows, length), the text.
        dense_WLD: what the last dense block returns on it.
        states_NWLD: what the last block of each sub-model returns, in any dtype.
        device: where the head runs.
        dtype: of forward passes.
        progress: called with (phase, done, total).
    """
    total_N = torch.zeros(len(states_NWLD), dtype=torch.float64)
    step = rows_at_once(LOGITS, blocks.model.config.get_text_config().vocab_size)

    def predictions(ids_1P: Tensor, states_PD: Tensor) -> Predictions:
        with forward_precision(dtype, device):
            logits_1PV = logits_after(blocks, ids_1P, states_PD[None].to(device, torch.float32))
        return Predictions(logits_1PV[0].float())

    for window, ids_L in enumerate(tokens_WL):
        progress("Comparing sub-models", window, len(tokens_WL))
        for start in range(0, len(ids_L), step):
            at = slice(start, start + step)
            ids_1P = ids_L[None, at].to(device, torch.long)
            dense = predictions(ids_1P, dense_WLD[window, at])
            for number, states_WLD in enumerate(states_NWLD):
                pruned = predictions(ids_1P, states_WLD[window, at])
                total_N[number] += dense.divergence(pruned).double().sum().cpu()
    progress("Comparing sub-models", len(tokens_WL), len(tokens_WL))
    mean_N = total_N / tokens_WL.numel()
    return [float(value) for value in mean_N.nan_to_num(nan=torch.inf, posinf=torch.inf)]
