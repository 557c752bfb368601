"""Cut the blocks one after the other, each refitted behind the blocks cut before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.blocks.inputs import InputAccumulator, LinearGroup, visit_inputs
from secateur.blocks.loop import advance_stream
from secateur.blocks.streams import Stream
from secateur.models.store import BlockStore
from secateur.runs.files import write_safetensors
from secateur.shrinking.cut import cut, kept_columns, stored_output
from secateur.shrinking.masking import installed
from secateur.shrinking.ordering import order_units
from secateur.shrinking.output_fit import fit_output
from secateur.shrinking.units import SubBlock, Width, output_linear
from secateur.solvers.ridge import cut_loss


@dataclass(frozen=True)
class CutSubBlock:
    """A sub-block that has its final width.

    Attributes:
        kept: what stays, as ``units`` has it.
        refitted: parameters with new values by name inside the block, of the kept units alone.
        error: squared change of its output over its squared output, on held-out tokens.
        plain_error: the same had the kept columns not been refitted.
        notes: fallbacks that were needed.
    """

    kept: Tensor
    refitted: dict[str, Tensor]
    error: float
    plain_error: float
    notes: tuple[str, ...] = ()


@torch.no_grad()
def cut_blocks(
    store: BlockStore,
    sub_blocks: Sequence[SubBlock],
    widths: Sequence[Width],
    stream: Stream,
    folder: Path,
) -> Iterator[list[CutSubBlock]]:
    """Cut the blocks that the stream has not passed; yield each block's sub-blocks.

    The units of a sub-block are ordered anew on what the blocks cut before it hand on, the last of
    that order stay, and the output matrix is fitted to its dense output on the same
    inputs (``fit_output``). Where that does not lower the error on held-out tokens, it stays as it
    was. A block's new parameters are on disk before it is yielded.

    Args:
        store: the dense model.
        sub_blocks: its sub-blocks.
        widths: to which each of them is cut.
        stream: hidden states of the model cut so far.
        folder: where new parameters are put, for ``read_refitted``.

    Raises:
        SecateurError: weights or hidden states are not finite.
    """
    for index in range(stream.position, len(store.blocks)):
        block = store.load(index)
        done: list[CutSubBlock] = []
        with ExitStack() as stack:
            for sub_block, width in zip(sub_blocks, widths, strict=True):
                if sub_block.block == index:
                    dtype = store.weight_dtype(index)
                    done.append(_cut_sub_block(block, sub_block, width, stream, dtype))
                    _install(stack, block, sub_block, done[-1].kept, done[-1].refitted)
            advance_stream(block, stream, [], store.blocks.name(index))
        store.release(index)
        new = {name: tensor for each in done for name, tensor in each.refitted.items()}
        write_safetensors(refitted_file(folder, index), new)
        yield done


@torch.no_grad()
def pass_cut_blocks(
    store: BlockStore,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Tensor],
    stream: Stream,
    folder: Path,
) -> None:
    """Carry the stream through blocks that ``cut_blocks`` finished in an earlier session.

    Args:
        store: the dense model.
        sub_blocks: those of the finished blocks.
        kept: what stayed of each of them.
        stream: hidden states before the first block.
        folder: where their new parameters are.
    """
    for index in range(sub_blocks[-1].block + 1):
        block = store.load(index)
        new = read_refitted(folder, index)
        with ExitStack() as stack:
            for sub_block, units in zip(sub_blocks, kept, strict=True):
                if sub_block.block == index:
                    _install(stack, block, sub_block, units, new)
            advance_stream(block, stream, [], store.blocks.name(index))
        store.release(index)


def read_refitted(folder: Path, index: int) -> dict[str, Tensor]:
    """Return the parameters of a block that ``cut_blocks`` gave new values."""
    return load_file(refitted_file(folder, index))


def refitted_file(folder: Path, index: int) -> Path:
    """Where the new parameters of a block are."""
    return folder / f"block-{index:03d}.safetensors"


def _cut_sub_block(
    block: nn.Module, sub_block: SubBlock, width: Width, stream: Stream, dtype: torch.dtype
) -> CutSubBlock:
    if width == sub_block.whole:
        return CutSubBlock(torch.arange(width.units), {}, 0.0, 0.0)
    if width.units == 0:
        return CutSubBlock(torch.arange(0), {}, 1.0, 1.0)
    weight_OI = output_linear(block, sub_block).weight_OI.float()
    fitted_II, held_out_II = (
        _gram(block, sub_block, stream, batches)
        for batches in (stream.batches.fitted, stream.batches.held_out)
    )
    queries = width.queries < sub_block.heads_per_unit
    found = order_units(sub_block, weight_OI, fitted_II, queries=queries)
    kept = found.kept(width)
    columns_K = kept_columns(sub_block, kept).to(weight_OI.device)
    # Rounded as the file will hold it, so that the blocks behind it see what is saved.
    fit = fit_output(weight_OI, fitted_II, held_out_II, columns_K, dtype)
    whole = float(cut_loss(weight_OI, weight_OI[:, :0], columns_K[:0], held_out_II))
    whole = max(whole, torch.finfo(torch.float32).tiny)
    new = stored_output(sub_block, fit.v_OK) if fit.changed else {}
    return CutSubBlock(kept, new, fit.loss / whole, fit.plain_loss / whole, found.notes)


def _gram(
    block: nn.Module, sub_block: SubBlock, stream: Stream, batches: Sequence[slice]
) -> Tensor:
    linear = output_linear(block, sub_block)
    total = InputAccumulator(linear.weight_OI.shape[1], "gram", stream.device, stream.dtype)
    for batch in batches:
        visit_inputs(
            [LinearGroup((linear,))],
            partial(stream.forward, block, batch),
            lambda _, x_NI: total.add(x_NI),
        )
    return total.gram()


def _install(
    stack: ExitStack,
    block: nn.Module,
    sub_block: SubBlock,
    kept: Tensor,
    new: Mapping[str, Tensor],
) -> None:
    width = sub_block.width_of(kept)
    if width != sub_block.whole:
        own = {axis.parameter: block.get_parameter(axis.parameter) for axis in sub_block.axes}
        small = cut(sub_block, own, kept)
        small |= {name: tensor.to(small[name]) for name, tensor in new.items() if name in small}
        stack.enter_context(installed(block, sub_block, small, width))
