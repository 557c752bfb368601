"""Low-rank adapters beside the linears of a model, by the package peft, and their merging."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import nn

from secateur.models.structure import BlockList, find_linears
from secateur.runs.errors import SecateurError
from secateur.training.holding import Whole
from secateur.training.options import Training


def check_installed() -> None:
    """Raise SecateurError if the package that adapters come from is not there."""
    if find_spec("peft") is None:
        raise SecateurError(
            "Recovery with LoRA needs the package peft; install secateur[recover], or use "
            "--network full."
        )


def count_parameters(blocks: BlockList, rank: int) -> int:
    """Parameters of adapters of this rank beside all linears of the blocks."""
    return sum(
        rank * sum(linear.weight_OI.shape) for block in blocks for linear in find_linears(block)
    )


class Adapters:
    """LoRA, W + B·A, beside every linear of a model's blocks; B begins at zero.

    Units that a padded model holds as zeros stay so: A begins at zero in their columns and B in
    their rows, and neither receives a gradient there.

    Attributes:
        parameters: A and B of every linear, by name in the model.
    """

    def __init__(self, blocks: BlockList, rank: int, seed: int) -> None:
        """Put adapters into the model.

        Args:
            blocks: the model, with weights.
            rank: columns of B and rows of A; the product is not scaled.
            seed: decides how A begins.
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        linears = {
            f"{blocks.name(index)}.{linear.name}": linear
            for index, block in enumerate(blocks)
            for linear in find_linears(block)
        }
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
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter
            for name, parameter in blocks.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }

    def merge(self) -> None:
        """Add every product to its weight, and leave the model with its own modules."""
        self._tuner.merge_and_unload()


class Adapted(Whole):
    """A model of which its adapters alone are trained."""

    def __init__(self, blocks: BlockList, adapters: Adapters) -> None:
        super().__init__(blocks, [])
        self._adapters = adapters

    def train(self, options: Training) -> Mapping[str, nn.Parameter]:
        return self._adapters.parameters
