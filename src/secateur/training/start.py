"""Where training starts: masked linears, from a dense checkpoint or a pruned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.blocks.inputs import InputAccumulator, find_groups, visit_inputs
from secateur.blocks.precision import forward_precision
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import linear_shapes
from secateur.models.masks import block_masks
from secateur.models.structure import BlockList, Linear, find_linears
from secateur.patterns.pattern import Unstructured
from secateur.patterns.plan import Plan, uniform_plan
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress
from secateur.solvers.ridge import low_rank_fit
from secateur.training.low_rank import MaskedLoRA, SLoRB, check_group
from secateur.training.masked_linear import MaskedLinear, masked_forward
from secateur.training.masks import RowBudget, choose_mask, magnitude
from secateur.training.options import Training
from secateur.training.ranks import Ranks

# Tokens of text for each input column of the widest linear, to start SLoRB by covariance.
_TOKENS_PER_COLUMN = 4


def named_linears(blocks: BlockList) -> dict[str, Linear]:
    """All linears that are worked on by full name."""
    return {
        f"{blocks.name(index)}.{linear.name}": linear
        for index in range(len(blocks))
        for linear in blocks.linears(index)
    }


def check_model(blocks: BlockList, options: Training) -> None:
    """Raise SecateurError if the model's linears cannot be trained with these options."""
    linears = named_linears(blocks)
    if first_plan(blocks, options).weights.keys() != linears.keys():
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


def check_shardable(options: Training, linears: Mapping[str, Linear], ranks: Ranks) -> None:
    """Raise SecateurError if the model cannot be divided among the processes."""
    if ranks.world == 1:
        return
    if options.starts_by_covariance:
        # It looks at more rows at once than one process has.
        raise SecateurError(
            "low_rank.start: covariance works in one process alone; leave it out, or start without "
            "torchrun."
        )
    for name, linear in linears.items():
        rows = len(linear.weight_OI)
        # Shards of columns of the stored matrix must be of one size.
        if linear.transposed and rows % ranks.world:
            raise SecateurError(
                f"The {rows} outputs of {name} cannot be divided evenly among {ranks.world} "
                "processes; start another number of processes."
            )


def pruned_masks(folder: Path, blocks: BlockList) -> dict[str, Tensor]:
    """The masks beside a pruned checkpoint, by full linear name; none if it has none."""
    masks: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        found = block_masks(folder, index, block)
        if found is None and find_linears(block):
            return {}
        masks |= {f"{blocks.name(index)}.{name}": mask for name, mask in (found or {}).items()}
    return masks


def first_plan(blocks: BlockList, options: Training) -> Plan:
    """Zeros of every linear, by shapes alone."""
    return uniform_plan(
        linear_shapes(blocks), Unstructured(0.0) if options.keeps_mask else options.pattern
    )


class FirstMasks:
    """Gives the linears of a model their first masks, block by block in order.

    With a frozen share of 1 masks may have any pattern, and a checkpoint without masks is taken
    by its zeros.
    """

    def __init__(self, blocks: BlockList, masks: Mapping[str, Tensor], options: Training) -> None:
        """Take the masks of a pruned checkpoint, or none."""
        self._blocks = blocks
        self._masks = masks
        self._options = options
        self._plan = first_plan(blocks, options)
        self._generator = torch.Generator().manual_seed(options.seed)

    def of_block(self, index: int) -> list[MaskedLinear]:
        """Mask the linears of a block, which has its weights.

        Raises:
            SecateurError: the masks have not the pattern.
        """
        prefix = self._blocks.name(index)
        linears = self._blocks.linears(index)
        return [self._masked(f"{prefix}.{linear.name}", linear) for linear in linears]

    def check(self, zeros: int) -> None:
        """Raise SecateurError unless all masks have the planned zeros, or some to keep."""
        planned = sum(self._plan.zeros.values())
        if self._options.keeps_mask and zeros == 0:
            raise SecateurError(
                "The checkpoint has no mask to keep and no zeros; name a pruned one, or another "
                "preset."
            )
        if not self._options.keeps_mask and zeros != planned:
            raise SecateurError(
                f"The masks beside the checkpoint have {zeros} zeros where pattern "
                f"{self._plan.pattern} puts {planned}; give its sparsity, or start from the dense "
                "model."
            )

    def _masked(self, name: str, linear: Linear) -> MaskedLinear:
        options, weight_OI = self._options, linear.weight_OI
        mask_OI = self._masks.get(name)
        if mask_OI is None and options.keeps_mask:
            mask_OI = weight_OI != 0
        if mask_OI is None:
            rows = RowBudget.even(self._plan.pattern, len(weight_OI), self._plan.zeros[name])
            mask_OI = choose_mask(magnitude(weight_OI), rows)
        else:
            try:
                rows = RowBudget.of_mask(self._plan.pattern, mask_OI)
            except SecateurError as error:
                raise SecateurError(
                    f"The mask of {name} beside the checkpoint does not fit: {error}; give its "
                    "pattern, or start from the dense model."
                ) from error
        mask_OI = mask_OI.to(weight_OI.device)
        slorb = lora = None
        if options.low_rank is not None:
            slorb = SLoRB(
                weight_OI * ~mask_OI,
                options.low_rank.group,
                train_projection=options.low_rank.train_projection,
            )
        if options.train == "lora":
            lora = MaskedLoRA.start(weight_OI.shape, options.lora_rank, self._generator)
            lora = lora.to(weight_OI.device)
        return MaskedLinear(name, linear, rows, mask_OI, slorb, lora)


def masked_linears(
    blocks: BlockList, masks: Mapping[str, Tensor], options: Training
) -> list[MaskedLinear]:
    """Give every linear of a loaded model its first mask; as for ``FirstMasks``."""
    first = FirstMasks(blocks, masks, options)
    linears = [each for index in range(len(blocks)) for each in first.of_block(index)]
    first.check(count_zeros(linears))
    return linears


def count_zeros(linears: Sequence[MaskedLinear]) -> int:
    """Zeros of all masks."""
    return sum(int(torch.count_nonzero(~each.mask)) for each in linears)


@torch.no_grad()
def start_slorb_by_covariance(
    blocks: BlockList,
    linears: Sequence[MaskedLinear],
    dense: Checkpoint,
    windows_WL: Tensor,
    *,
    batch: int,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Let every SLoRB begin as what its linear lacks, for inputs such as those of the text.

    Inputs are those of the masked model with the products of earlier blocks. Each block takes a
    pass over some text up to it.

    Args:
        blocks: of the model in training.
        linears: with SLoRB, in any order.
        dense: the checkpoint whose weights are lacking.
        windows_WL: text, of which the beginning is used.
        batch: windows in one forward pass.
        dtype: of forward passes.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: the dense checkpoint does not match the model.
    """
    if linear_shapes(dense.blocks) != linear_shapes(blocks):
        raise SecateurError(
            f"{dense.folder} has other linears than the model; name its dense model."
        )
    named = {each.name: each for each in linears}
    widest = max(each.mask_OI.shape[1] for each in linears)
    count = -(-_TOKENS_PER_COLUMN * widest // windows_WL.shape[1])
    device = blocks.model.device
    batches = [part.to(device).long() for part in windows_WL[:count].split(batch)]

    def run(tokens_WL: Tensor) -> None:
        with masked_forward(linears), forward_precision(dtype, device):
            blocks.model.base_model(input_ids=tokens_WL, use_cache=False)

    for index in range(len(blocks)):
        groups = find_groups(blocks.linears(index), partial(run, batches[0][:1]))
        sums = [
            InputAccumulator(group.linears[0].weight_OI.shape[1], "gram", device, dtype)
            for group in groups
        ]
        for tokens_WL in batches:
            visit_inputs(groups, partial(run, tokens_WL), partial(_add, sums))
        for group, total in zip(groups, sums, strict=True):
            gram_II = total.result().gram_II
            assert gram_II is not None, "it was asked for"
            for linear in group.linears:
                each = named[f"{blocks.name(index)}.{linear.name}"]
                name = f"{linear.name}.weight"
                stored = dense.tensors.blocks[index].read(dense.reader, [name])[name]
                stored = stored.to(each.weight)
                residual_OI = each.in_rows(stored - each.weight * each.mask)
                assert each.low_rank is not None, "every linear has one"
                s_OR, x_RI = each.low_rank.s_OR, each.low_rank.x_RI
                best = low_rank_fit(residual_OI, gram_II, s_OR.shape[1])
                for factor, value in zip((s_OR, x_RI), best, strict=True):
                    factor.copy_(value)
        progress("Fitting low-rank products", index + 1, len(blocks))


def _add(sums: Sequence[InputAccumulator], index: int, x_NI: Tensor) -> None:
    sums[index].add(x_NI)
