"""Find the decoder blocks of a causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from secateur.architecture.linears import find_linears
from secateur.errors import SecateurError


@dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model.

    Attributes:
        model: the whole model, with or without weights.
        prefix: name of the module list inside the model, such as ``model.layers``.
        modules: the list itself.
    """

    model: PreTrainedModel
    prefix: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int) -> nn.Module:
        return self.modules[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def name(self, index: int) -> str:
        """Full name of one block, such as ``model.layers.3``."""
        return f"{self.prefix}.{index}"


def find_blocks(model: PreTrainedModel) -> BlockList:
    """Return the module list that holds most of the model's linear weights.

    Raises:
        SecateurError: no module list with linears exists, so this is no stack of blocks.
    """
    best: BlockList | None = None
    best_size = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        size = sum(linear.weight_OI.numel() for block in module for linear in find_linears(block))
        # A list inside a block (experts) is smaller than the list of blocks that contains it.
        if size > best_size:
            best, best_size = BlockList(model, name, module), size
    if best is None:
        raise SecateurError(
            f"{type(model).__name__} has no list of decoder blocks with linears; "
            "use a causal language model built from a stack of blocks."
        )
    return best
