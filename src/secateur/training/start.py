"""Where training starts: masked linears, from a dense checkpoint or a pruned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.experts import linear_shapes
from secateur.models.masks import block_masks
from secateur.models.structure import BlockList, Linear, find_linears
from secateur.patterns.pattern import Unstructured
from secateur.patterns.plan import Plan, uniform_plan
from secateur.runs.errors import SecateurError
from secateur.training.low_rank import LowRank, check_group
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import RowBudget, choose_mask, magnitude
from secateur.training.options import Training
from secateur.training.sparse_lora import SparseLoRA


def named_linears(blocks: BlockList) -> dict[str, Linear]:
    """All prunable linears by full name."""
    return {
        f"{blocks.name(index)}.{linear.name}": linear
        for index, block in enumerate(blocks)
        for linear in find_linears(block)
    }


def check_model(blocks: BlockList, options: Training) -> None:
    """Raise SecateurError if the model's linears cannot be trained with these options."""
    linears = named_linears(blocks)
    plan = first_plan(blocks, options)
    if plan.weights.keys() != linears.keys():
        raise SecateurError(
            f"{type(blocks.model).__name__} stacks its experts, which training does not take; "
            "choose a model without experts, or prune this one."
        )
    if options.low_rank is not None:
        for name, linear in linears.items():
            try:
                check_group(linear.weight_OI.shape[1], options.low_rank.group)
            except SecateurError as error:
                raise SecateurError(f"{name}: {error}") from error


def pruned_masks(folder: Path, blocks: BlockList) -> dict[str, Tensor]:
    """The masks beside a pruned checkpoint, by full linear name; none if it has none."""
    masks: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        found = block_masks(folder, index, block)
        if not found and find_linears(block):
            return {}
        masks |= {f"{blocks.name(index)}.{name}": mask for name, mask in found.items()}
    return masks


def masked_linears(
    blocks: BlockList, masks: Mapping[str, Tensor], options: Training
) -> list[MaskedLinear]:
    """Give every linear of a loaded model its first mask.

    Args:
        blocks: with weights.
        masks: those of a pruned checkpoint, or none.
        options: with a frozen share of 1 the masks may have any pattern, and a checkpoint without
            masks is taken by its zeros.

    Raises:
        SecateurError: the masks have not the pattern, or there is nothing to keep.
    """
    plan = first_plan(blocks, options)
    generator = torch.Generator().manual_seed(options.seed)
    linears = [
        each
        for index in range(len(blocks))
        for each in masked_linears_of(blocks, index, plan, masks, options, generator)
    ]
    check_zeros(count_zeros(linears), plan, options.keeps_mask)
    return linears


def masked_linears_of(
    blocks: BlockList,
    index: int,
    plan: Plan,
    masks: Mapping[str, Tensor],
    options: Training,
    generator: torch.Generator,
) -> list[MaskedLinear]:
    """Give every linear of one block, the only one with weights, its first mask."""
    linears = []
    for linear in find_linears(blocks[index]):
        name = f"{blocks.name(index)}.{linear.name}"
        weight_OI = linear.weight_OI
        mask_OI = masks.get(name)
        if mask_OI is None and options.keeps_mask:
            mask_OI = weight_OI != 0
        if mask_OI is None:
            rows = RowBudget.even(plan.pattern, len(weight_OI), plan.zeros[name])
            mask_OI = choose_mask(magnitude(weight_OI), rows)
        else:
            rows = _rows_of(name, mask_OI, options)
        mask_OI = mask_OI.to(weight_OI.device)
        boost = None
        if options.low_rank is not None:
            boost = LowRank(
                weight_OI * ~mask_OI,
                options.low_rank.group,
                train_projection=options.low_rank.train_projection,
            )
        lora = None
        if options.train == "lora":
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            lora = SparseLoRA.start(shape, options.lora_rank, generator).to(weight_OI.device)
        linears.append(MaskedLinear(name, linear, rows, mask_OI, boost, lora))
    return linears


def count_zeros(linears: Sequence[MaskedLinear]) -> int:
    """Zeros of all masks."""
    return sum(int(torch.count_nonzero(~each.mask)) for each in linears)


def first_plan(blocks: BlockList, options: Training) -> Plan:
    """Zeros of every linear, by shapes alone."""
    return uniform_plan(
        linear_shapes(blocks), Unstructured(0.0) if options.keeps_mask else options.pattern
    )


def _rows_of(name: str, mask_OI: Tensor, options: Training) -> RowBudget:
    try:
        pattern = Unstructured(0.0) if options.keeps_mask else options.pattern
        return RowBudget.of_mask(pattern, mask_OI)
    except SecateurError as error:
        raise SecateurError(
            f"The mask of {name} beside the checkpoint does not fit: {error}; give its pattern, or "
            "start from the dense model."
        ) from error


def check_zeros(zeros: int, plan: Plan, kept: bool) -> None:
    """Raise SecateurError unless the masks' zeros are those planned, or there are some to keep."""
    planned = sum(plan.zeros.values())
    if kept and zeros == 0:
        raise SecateurError(
            "The checkpoint has no mask to keep and no zeros; name a pruned one, or another preset."
        )
    if not kept and zeros != planned:
        raise SecateurError(
            f"The masks beside the checkpoint have {zeros} zeros where pattern {plan.pattern} puts "
            f"{planned}; give its sparsity, or start from the dense model."
        )
