"""Low-rank products that begin with what text says the masked linears lack most."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.blocks.inputs import InputAccumulator, find_groups, visit_inputs
from secateur.blocks.precision import forward_precision
from secateur.models.checkpoint import map_tensors
from secateur.models.reader import CheckpointReader
from secateur.models.structure import BlockList, find_linears
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress
from secateur.solvers.ridge import low_rank_fit
from secateur.training.masked_linear import MaskedLinear, masked_forward

# Tokens for each input column of the widest linear.
_TOKENS_PER_COLUMN = 4


@torch.no_grad()
def fit_boosts(
    blocks: BlockList,
    linears: Sequence[MaskedLinear],
    dense: Path,
    windows_WL: Tensor,
    *,
    batch: int,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Fit every low-rank product to what its masked linear lacks, block after block.

    Inputs are those of the masked model with the products of earlier blocks. Each block takes a
    pass over some text up to it.

    Args:
        blocks: of the model in training.
        linears: with low-rank products, in any order.
        dense: folder of the checkpoint whose weights are lacking.
        windows_WL: text, of which the beginning is used.
        batch: windows in one forward pass.
        dtype: of forward passes.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: the dense checkpoint does not match the model.
    """
    reader = CheckpointReader(dense)
    tensors = map_tensors(blocks, reader)
    if isinstance(tensors, str):
        raise SecateurError(f"{dense} does not match the model: {tensors}; name its dense model.")
    named = {each.name: each for each in linears}
    widest = max(each.mask_OI.shape[1] for each in linears)
    count = -(-_TOKENS_PER_COLUMN * widest // windows_WL.shape[1])
    batches = [part.to(blocks.model.device).long() for part in windows_WL[:count].split(batch)]

    def run(tokens_WL: Tensor) -> None:
        with masked_forward(linears), forward_precision(dtype, blocks.model.device):
            blocks.model.base_model(input_ids=tokens_WL, use_cache=False)

    for index, block in enumerate(blocks):
        groups = find_groups(find_linears(block), partial(run, batches[0][:1]))
        sums = [
            InputAccumulator(
                group.linears[0].weight_OI.shape[1], "gram", blocks.model.device, dtype
            )
            for group in groups
        ]
        for tokens_WL in batches:
            visit_inputs(groups, partial(run, tokens_WL), partial(_add, sums))
        for group, total in zip(groups, sums, strict=True):
            gram_II = total.result().gram_II
            assert gram_II is not None, "it was asked for"
            for linear in group.linears:
                each = named[f"{blocks.name(index)}.{linear.name}"]
                file = tensors.blocks[index][f"{linear.name}.weight"]
                stored = reader.read([file])[file].to(each.weight)
                residual_OI = each.in_rows(stored - each.weight * each.mask)
                assert each.low_rank is not None, "every linear has one"
                each.low_rank.begin_with(
                    *low_rank_fit(residual_OI, gram_II, each.low_rank.s_OR.shape[1])
                )
        progress("Fitting low-rank products", index + 1, len(blocks))


def _add(sums: Sequence[InputAccumulator], index: int, x_NI: Tensor) -> None:
    sums[index].add(x_NI)
