"""Cut the blocks one after the other, each refitted behind the blocks cut before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.blocks.inputs import InputAccumulator, LinearGroup, visit_inputs
from secateur.blocks.streams import Stream, advance_stream, loaded_blocks
from secateur.models.store import BlockStore
from secateur.models.structure import Linear
from secateur.runs.files import write_safetensors
from secateur.shrinking.ordering import order_units
from secateur.shrinking.sub_models import cut_to
from secateur.shrinking.units import SubBlock, Width
from secateur.solvers.ridge import cut_loss


@dataclass(frozen=True)
class CutSubBlock:
    """A sub-block that has its final width.

    Attributes:
        kept: what stays.
        refitted: cut parameters with new values, by name inside the block.
        error: squared change of its output over its squared output, on held-out tokens.
        plain_error: the same without a refit.
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
    """Cut the blocks that the stream has not passed to their widths; yield their sub-blocks.

    The units of a sub-block are ordered anew on what the blocks cut before it hand on, and the last
    of that order stay. The output matrix is fitted to its dense output on the same inputs
    (``fit_output``); where that does not lower the error on held-out tokens, it stays as it was. A
    block's new parameters are in the folder (``read_refitted``) before it is yielded.

    Raises:
        SecateurError: weights or hidden states are not finite.
    """
    for index, name, block in loaded_blocks(store, range(stream.position, len(store.blocks))):
        done: list[CutSubBlock] = []
        new: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for sub_block, width in zip(sub_blocks, widths, strict=True):
                if sub_block.block == index:
                    dtype = store.weight_dtype(index)
                    done.append(_cut_sub_block(block, sub_block, width, stream, dtype))
                    new |= done[-1].refitted
                    stack.enter_context(cut_to(block, sub_block, done[-1].kept, new))
            advance_stream(block, stream, [], name)
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
    """Carry a stream through the first blocks, whose ``sub_blocks`` ``cut_blocks`` has cut."""
    for index, name, block in loaded_blocks(store, range(sub_blocks[-1].block + 1)):
        new = read_refitted(folder, index)
        with ExitStack() as stack:
            for sub_block, units in zip(sub_blocks, kept, strict=True):
                if sub_block.block == index:
                    stack.enter_context(cut_to(block, sub_block, units, new))
            advance_stream(block, stream, [], name)


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
    linear = sub_block.output_linear(block)
    weight_OI = linear.weight_OI.float()
    fitted_II = _gram(block, linear, stream, stream.batches.fitted)
    held_out_II = _gram(block, linear, stream, stream.batches.held_out)
    queries = width.queries < sub_block.heads_per_unit
    order = order_units(sub_block, weight_OI, fitted_II, queries=queries)
    # Rounded as the file will hold it, so that the blocks behind it see what is saved.
    fit = order.fit(width, held_out_II, dtype)
    none_K = torch.arange(0, device=weight_OI.device)
    whole = float(cut_loss(weight_OI, weight_OI[:, :0], none_K, held_out_II))
    whole = max(whole, torch.finfo(torch.float32).tiny)
    new = sub_block.stored_output(fit.v_OK) if fit.changed else {}
    return CutSubBlock(
        order.kept(width), new, fit.loss / whole, fit.plain_loss / whole, order.notes
    )


def _gram(block: nn.Module, linear: Linear, stream: Stream, batches: Sequence[slice]) -> Tensor:
    total = InputAccumulator(linear.weight_OI.shape[1], "gram", stream.device, stream.dtype)
    for batch in batches:
        visit_inputs(
            [LinearGroup((linear,))],
            partial(stream.forward, block, batch),
            lambda _, x_NI: total.add(x_NI),
        )
    return total.gram()
