"""Where the decoder blocks of a model and the linears of a block are, found by structure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.runs.errors import SecateurError

# Choosing an expert wrongly costs more than a router's few weights could ever save.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
# What configurations call the number of positions.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "max_decoder_position_embeddings",
    "model_max_length",
    "context_length",
    "seq_length",
    "seq_len",
    "n_ctx",
)
# The first position of these is the one behind that of padding.
_NUMBERED_FROM_PADDING = frozenset(
    {
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
        *("camembert", "data2vec-text", "xmod"),
    }
)


class TransposedLinear(nn.Module):
    """A linear whose weight is stored (in, out), with a bias or without."""

    def __init__(self, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_IO, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(self, x_NI: Tensor) -> Tensor:
        return nn.functional.linear(x_NI, self.weight.T, self.bias)


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: name inside the block, such as ``self_attn.q_proj``.
        module: the module that holds the weight.
        transposed: the module stores (in, out) instead of (out, in).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def kind(self) -> str:
        """The name without numbers: the same for all experts of a mixture."""
        return re.sub(r"\d+", "*", self.name)

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (out, in); a view, so writing into it writes into the module."""
        weight = self.module.get_parameter("weight").data
        return weight.T if self.transposed else weight

    @property
    def parameter_OI(self) -> Tensor:
        """The weight as (out, in), with its gradient going to the module."""
        weight = self.module.get_parameter("weight")
        return weight.T if self.transposed else weight

    @property
    def bias_O(self) -> Tensor | None:
        """The bias, None without one; the module's own, as the weight."""
        bias = self.module._parameters.get("bias")
        return None if bias is None else bias.data


def find_linears(block: nn.Module) -> list[Linear]:
    """Return the prunable linears of a block in definition order; routers are left alone.

    A linear without weights, what is left of attention that lost all its heads, is none.
    """
    return [
        Linear(name, module, transposed=isinstance(module, Conv1D | TransposedLinear))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D | TransposedLinear)
        and ROUTERS.isdisjoint(name.split("."))
        and module.weight.numel() > 0
    ]


@dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model.

    Attributes:
        model: the whole model, with or without weights.
        prefix: name of the module list inside the model, such as ``model.layers``.
        modules: those of the list that text passes through.
        positions: where they are in the list. What text passes by, such as cross-attention to
            images, is no block.
        beside: for each block, how many values it returns in a tuple behind the hidden states;
            None if it returns hidden states alone.
        chosen: full names of the linears that are worked on, the others are left as they are; all
            of them if None.
    """

    model: PreTrainedModel
    prefix: str
    modules: nn.ModuleList
    positions: tuple[int, ...]
    beside: tuple[int | None, ...]
    chosen: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int) -> nn.Module:
        return self.modules[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def name(self, index: int) -> str:
        """Full name of one block, such as ``model.layers.3``."""
        return f"{self.prefix}.{self.positions[index]}"

    def linears(self, index: int) -> list[Linear]:
        """The linears of a block that are worked on, in definition order."""
        found, chosen = find_linears(self[index]), self.chosen
        if chosen is None:
            return found
        return [linear for linear in found if f"{self.name(index)}.{linear.name}" in chosen]

    def returned(self, index: int, x_BLD: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states in the form in which a block returns them."""
        beside = self.beside[index]
        return x_BLD if beside is None else (x_BLD, *[None] * beside)


def positions_of(config: PreTrainedConfig) -> int | None:
    """Largest number of positions the model was made for, None if it has no bound."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False):
        # Distances have no end. MPT builds its own for a length that it names, and says so inside.
        return None
    # Files of other families carry names that their classes do not know, left by the training.
    declared = inspect.signature(type(text)).parameters
    names = [text.attribute_map.get(_POSITIONS[0], _POSITIONS[0])]
    names += [name for name in _POSITIONS if name in declared]
    found = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    positions = next((value for value in found if value > 0), None)
    if positions is not None and getattr(text, "model_type", "") in _NUMBERED_FROM_PADDING:
        positions -= (text.pad_token_id or 0) + 1
    return positions


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Tokens that the model has an input embedding for, None if they cannot be counted."""
    try:
        return len(model.get_input_embeddings().get_parameter("weight"))
    except (AttributeError, NotImplementedError):
        return vocabulary_size(model.config)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Tokens of the model's vocabulary, None if its configuration does not say."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_length(config: PreTrainedConfig, length: int, what: str = "Calibration") -> None:
    """Raise SecateurError if windows of text are longer than the model's positions."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise SecateurError(
            f"{what} windows of {length} tokens are longer than the model's {positions} "
            f"positions; give --length {positions} or less."
        )
