"""What a unit seems to be worth before any sub-model is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList
from secateur.shrinking.units import SubBlock, output_linear
from secateur.solvers.unit_scores import fluctuation_columns, unit_means, wanda_columns

Prior = Literal["wanda", "magnitude", "fluctuation", "random"]


@dataclass(frozen=True)
class InputMoments:
    """Means over tokens of what the columns of an output linear receive, fp32 (columns,)."""

    absolute_I: Tensor
    mean_I: Tensor
    square_I: Tensor


class _MomentSums:
    """Sums of inputs over batches."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums_MI: Tensor | None = None

    def add(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NI = inputs[0].detach().flatten(0, -2).float()
        with torch.autocast(x_NI.device.type, enabled=False):
            sums_MI = torch.stack([x_NI.abs().sum(0), x_NI.sum(0), x_NI.square().sum(0)])
        self.sums_MI = sums_MI if self.sums_MI is None else self.sums_MI + sums_MI
        self.tokens += len(x_NI)

    def result(self) -> InputMoments:
        assert self.sums_MI is not None, "no forward pass has reached the linear"
        return InputMoments(*(self.sums_MI / self.tokens).unbind())


@contextmanager
def observed_moments(
    blocks: BlockList, sub_blocks: Sequence[SubBlock]
) -> Iterator[Callable[[], list[InputMoments]]]:
    """Within the context, forward passes are observed; the function gives each sub-block's moments.

    The columns are those that the output linears have during the passes.
    """
    sums = [_MomentSums() for _ in sub_blocks]
    with ExitStack() as stack:
        for sub_block, total in zip(sub_blocks, sums, strict=True):
            output = blocks[sub_block.block].get_submodule(sub_block.output)
            stack.callback(output.register_forward_pre_hook(total.add).remove)
        yield lambda: [total.result() for total in sums]


def output_weight(blocks: BlockList, sub_block: SubBlock, kept: Tensor) -> Tensor:
    """Columns of the output linear that belong to kept units, fp32 (out, columns)."""
    weight_OI = output_linear(blocks[sub_block.block], sub_block).weight_OI
    return weight_OI[:, sub_block.columns_UP[kept].flatten().to(weight_OI.device)].float()


def score_units(
    prior: Prior, moments: InputMoments, w_OI: Tensor, unit: int, generator: torch.Generator
) -> Tensor:
    """Return one prior per unit, the mean over its columns; fp32 on the CPU (units,).

    ``magnitude`` is mean |x|, ``random`` is uniform in [0, 1); for the others see
    ``solvers.unit_scores``. A sub-block whose priors are not finite gets zeros: all its units are
    equally suspect.

    Args:
        prior: which one.
        moments: of the inputs of the output linear.
        w_OI: its weight.
        unit: columns of one unit, which are consecutive.
        generator: of random priors.
    """
    if prior == "random":
        return torch.rand(w_OI.shape[1] // unit, generator=generator)
    if prior == "wanda":
        score_I = wanda_columns(w_OI, moments.square_I)
    elif prior == "magnitude":
        score_I = moments.absolute_I
    else:
        variance_I = (moments.square_I - moments.mean_I.square()).clamp_min(0)
        score_I = fluctuation_columns(w_OI, variance_I)
    score_U = unit_means(score_I, unit).cpu()
    return score_U if bool(score_U.isfinite().all()) else torch.zeros_like(score_U)
