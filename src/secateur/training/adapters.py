"""Low-rank adapters beside the linears of a model, by the package peft, and their merging."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.training.holding import Holding
from secateur.training.options import Training
from secateur.training.start import named_linears


def check_peft() -> None:
    """Raise SecateurError if the package that adapters come from is not installed."""
    if find_spec("peft") is None:
        raise SecateurError(
            "Recovery with LoRA needs the package peft; install secateur[recover], or use "
            "--network full."
        )


def count_parameters(blocks: BlockList, rank: int) -> int:
    """Parameters of adapters of this rank beside all linears of the blocks."""
    return sum(rank * sum(each.weight_OI.shape) for each in named_linears(blocks).values())


class Adapted(Holding):
    """A model of which low-rank adapters alone are trained: W + B·A, with B zero at the start.

    Units that a padded model holds as zeros stay so: A begins at zero in their columns and B in
    their rows, and neither receives a gradient there.
    """

    def __init__(self, blocks: BlockList, rank: int, seed: int) -> None:
        """Put adapters beside every linear of the blocks.

        Args:
            blocks: the model, with weights.
            rank: columns of B and rows of A; the product is not scaled.
            seed: decides how A begins.
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        super().__init__(blocks)
        linears = named_linears(blocks)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(linears),
            fan_in_fan_out=any(linear.transposed for linear in linears.values()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = LoraModel(blocks.model, config, "default")
        for name, linear in linears.items():
            first = blocks.model.get_submodule(f"{name}.lora_A.default")
            dead_I = (linear.weight_OI == 0).all(0)
            first.get_parameter("weight").data[:, dead_I] = 0

    def train(self, options: Training) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }

    def merge(self) -> None:
        """Add every product to its weight, and leave the model with its own modules."""
        self._tuner.merge_and_unload()
