"""How a process holds the model that is trained: here as a whole, in ``sharding`` a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from secateur.models.forwards import replaced_forwards
from secateur.models.structure import BlockList
from secateur.training.masked_linear import MaskedLinear, masked_forward
from secateur.training.options import Training

Result = TypeVar("Result")


class Holding:
    """The model, and what this process has of it: all, if it is the only one.

    Attributes:
        blocks: with the model; its parameters may be sharded.
        linears: those with a mask; weights, masks and budgets of this process's rows.
        replicated: names of trained parameters that every process has as a whole, where it has a
            part of the others.
    """

    def __init__(self, blocks: BlockList, linears: Sequence[MaskedLinear] = ()) -> None:
        self.blocks = blocks
        self.linears = linears
        self.replicated: set[str] = set()

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.blocks.model

    def train(self, options: Training) -> dict[str, nn.Parameter]:
        """Let what is trained, and nothing else, have gradients.

        Returns:
            This process's part of it, fp32, by name: parameters of the model, then those of
            low-rank products.
        """
        beside = {
            id(p) for each in self.linears if each.low_rank for p in each.low_rank.parameters()
        }
        trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in beside
            and (options.train == "all" or (options.train == "vectors" and parameter.ndim == 1))
        }
        for each in self.linears:
            if each.lora is not None:
                trained |= {f"{each.name}.lora.{n}": p for n, p in each.lora.named_parameters()}
            if each.low_rank is not None:
                trained[f"{each.name}.low_rank.s"] = each.low_rank.s_OR
                if each.low_rank.x_RI.requires_grad:
                    trained[f"{each.name}.low_rank.x"] = each.low_rank.x_RI
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return trained

    def masked(self, *, dense: bool = False) -> AbstractContextManager[None]:
        """Within the context the linears run with their masks, or ``dense``."""
        return nullcontext() if dense else masked_forward(self.linears)

    def forward(self, run: Callable[[], Result], *, last: bool = True) -> Result:
        """Run the model, forwards; gradients are complete after the ``last`` pass of a step."""
        return run()

    def evaluate(self, run: Callable[[], Result]) -> Result:
        """Run the model where no gradient is wanted."""
        return run()

    def collect_gradients(self) -> None:
        """Put the gradients of a step where the optimiser finds them."""

    def global_tensor(self, parameter: str, local: Tensor) -> Tensor:
        """A tensor laid out as this process's part of a parameter, as part of the whole."""
        return local


def recomputed(blocks: BlockList, wanted: bool) -> AbstractContextManager[None]:
    """Within the context blocks keep their inputs alone, and run again on the way back."""
    # No block draws random numbers in training.
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return replaced_forwards((block, partial(run, block.forward)) for block in blocks if wanted)
