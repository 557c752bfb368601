"""Run a sub-model: some units of a resident model, the others left out.

A sub-model is a list of kept units per sub-block and has no weights of its own: ``narrowed`` cuts
each block while it runs and puts the dense weights back behind it, so that a sub-model does less
work than the model and only one block exists twice. ``masked`` is the definition it is held to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.blocks.capture import capture
from secateur.models.store import BlockStore
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.shrinking.cut import cut, kept_columns
from secateur.shrinking.resizing import fit_attention, fit_linear
from secateur.shrinking.units import SubBlock, Width, attention_refused

# Another summation order changes fp32 sums by less than this; a wrong cut changes them by far more.
_TOLERANCE = 1e-3
_PROBE_TOKENS = 16


@contextmanager
def narrowed(
    blocks: Sequence[nn.Module] | BlockList, sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor]
) -> Iterator[None]:
    """Within the context, blocks run with the kept units alone.

    Args:
        blocks: the blocks of a model with its dense weights.
        sub_blocks: their sub-blocks.
        kept: what stays of each sub-block, as ``units`` has it.
    """
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            cuts = [
                (sub_block, units)
                for sub_block, units in zip(sub_blocks, kept, strict=True)
                if sub_block.block == index and sub_block.width_of(units) != sub_block.whole
            ]
            if cuts:
                stack.enter_context(_cut_while_running(block, cuts))
        yield


@contextmanager
def masked(
    blocks: Sequence[nn.Module] | BlockList, sub_blocks: Sequence[SubBlock], kept: Sequence[Tensor]
) -> Iterator[None]:
    """Within the context, what removed units hand to the output linear is multiplied by zero."""

    def masking(mask_I: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _module, inputs: (inputs[0] * mask_I.to(inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for sub_block, units in zip(sub_blocks, kept, strict=True):
            mask_I = torch.zeros(sub_block.columns_UP.numel())
            mask_I[kept_columns(sub_block, units)] = 1
            output = blocks[sub_block.block].get_submodule(sub_block.output)
            stack.enter_context(_hooked(output.register_forward_pre_hook(masking(mask_I))))
        yield


@torch.no_grad()
def check_cuttable(
    store: BlockStore, sub_blocks: Sequence[SubBlock], *, queries: bool = True
) -> None:
    """Try on the first block whether cutting a unit equals masking it, and a query head likewise.

    Structure alone does not show everything: positions may be tied to the number of a head.

    Args:
        store: the dense model.
        sub_blocks: its sub-blocks.
        queries: whether query heads are to go without their groups.

    Raises:
        SecateurError: cutting changes what the kept units compute.
    """
    with store.embeddings():
        captured = capture(store.blocks, _probe(store.blocks.model), last=0)
    call, x_BLD = captured.calls[0], captured.first_BLD
    block = store.load(0)

    def cut_is_masked(sub_block: SubBlock, kept: Tensor) -> bool:
        with masked([block], [sub_block], [kept]):
            expected_BLD = call(block, x_BLD)
        try:
            with narrowed([block], [sub_block], [kept]):
                actual_BLD = call(block, x_BLD)
        except (RuntimeError, ValueError, TypeError):
            return False
        return bool((actual_BLD - expected_BLD).norm() < _TOLERANCE * expected_BLD.norm())

    for sub_block in (each for each in sub_blocks if each.block == 0):
        if not cut_is_masked(sub_block, torch.arange(1, sub_block.units)):
            if sub_block.kind == "attention":
                raise attention_refused("what one head computes depends on how many there are")
            raise SecateurError(
                "The feed-forward of this family cannot be cut, what one channel computes depends "
                "on the others."
            )
        groups, heads = sub_block.whole
        if queries and heads > 1:
            later = torch.arange(groups * heads).view(groups, heads)[:, 1:]
            if not cut_is_masked(sub_block, later):
                raise SecateurError(
                    "The attention of this family cannot lose query heads alone, what one computes "
                    "depends on how many read the same keys; use --whole-groups."
                )
    store.release(0)


def _probe(model: PreTrainedModel) -> Tensor:
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0)


@contextmanager
def _cut_while_running(block: nn.Module, cuts: Sequence[tuple[SubBlock, Tensor]]) -> Iterator[None]:
    dense: list[tuple[SubBlock, dict[str, nn.Parameter]]] = []

    def narrow(*_: object) -> None:
        for sub_block, units in cuts:
            own = {axis.parameter: block.get_parameter(axis.parameter) for axis in sub_block.axes}
            dense.append((sub_block, own))
            small = cut(sub_block, own, units)
            install(block, sub_block, small, sub_block.width_of(units))

    def widen(*_: object) -> None:
        while dense:
            sub_block, own = dense.pop()
            install(block, sub_block, own, sub_block.whole)

    with (
        _hooked(block.register_forward_pre_hook(narrow)),
        _hooked(block.register_forward_hook(widen, always_call=True)),
    ):
        yield


@contextmanager
def installed(
    block: nn.Module, sub_block: SubBlock, tensors: Mapping[str, Tensor], width: Width
) -> Iterator[None]:
    """Within the context, a dense block has other parameters in a sub-block (``install``)."""
    own = {axis.parameter: block.get_parameter(axis.parameter) for axis in sub_block.axes}
    install(block, sub_block, tensors, width)
    try:
        yield
    finally:
        install(block, sub_block, own, sub_block.whole)


def install(
    block: nn.Module, sub_block: SubBlock, tensors: Mapping[str, Tensor], width: Width
) -> None:
    """Put other parameters into a block and tell its modules how wide they are now.

    Args:
        block: the block.
        sub_block: whose parameters they are.
        tensors: parameters by name inside the block; those that are ``nn.Parameter`` stay the same
            objects.
        width: that they have.
    """
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        block.get_submodule(owner)._parameters[leaf] = tensor
    for name in {axis.linear for axis in sub_block.axes}:
        fit_linear(block.get_submodule(name))
    if sub_block.kind == "attention":
        fit_attention(
            block.get_submodule(sub_block.attention),
            block.get_submodule(sub_block.output),
            heads=width.units * width.queries,
            groups=width.units,
        )


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
