"""What a unit seems to be worth before any sub-model is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.architecture import BlockList, find_linears
from secateur.structured.units import SubBlock

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
    """Columns of the output linear by kept unit, fp32 (out, kept, columns of each)."""
    linears = {linear.name: linear for linear in find_linears(blocks[sub_block.block])}
    columns_UP = sub_block.columns_UP[kept]
    weight_OI = linears[sub_block.output].weight_OI
    return weight_OI[:, columns_UP.to(weight_OI.device)].float()


def score_units(
    prior: Prior, moments: InputMoments, weight_OUP: Tensor, generator: torch.Generator
) -> Tensor:
    """Return one prior per unit, the mean over its columns; fp32 on the CPU (units,).

    ``wanda``: mean_i |w_ij| · √mean(x_j²), section 3 of arXiv 2306.11695 averaged over rows as in
    arXiv 2402.05406. ``magnitude``: mean |x_j|. ``fluctuation``: Var(x_j) · ‖w_j‖², equation 4 of
    arXiv 2312.11983. ``random``: uniform in [0, 1).

    A sub-block whose priors are not finite gets zeros: all its units are equally suspect.
    """
    units, columns = weight_OUP.shape[1:]
    if prior == "random":
        return torch.rand(units, generator=generator)
    if prior == "wanda":
        score_UP = weight_OUP.abs().mean(0) * moments.square_I.sqrt().view(units, columns)
    elif prior == "magnitude":
        score_UP = moments.absolute_I.view(units, columns)
    else:
        variance_I = (moments.square_I - moments.mean_I.square()).clamp_min(0)
        score_UP = weight_OUP.square().sum(0) * variance_I.view(units, columns)
    score_U = score_UP.mean(1).cpu()
    return score_U if bool(score_U.isfinite().all()) else torch.zeros(units)
