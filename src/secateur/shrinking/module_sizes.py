"""Blocks with widths of their own.

The source of this module travels with checkpoints whose blocks differ in width, so it needs
nothing but torch and transformers.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def resize(linear: Any, *, rows: int | None = None, columns: int | None = None) -> None:
    """Give a linear another number of outputs or inputs; its weights are not initialised."""
    shape = [*linear.weight.shape]
    transposed = isinstance(linear, Conv1D)
    if columns is not None:
        shape[0 if transposed else 1] = columns
    if rows is not None:
        shape[1 if transposed else 0] = rows
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.new_empty(rows))
    linear.weight = nn.Parameter(linear.weight.new_empty(shape))
    fit_linear(linear)


def fit_linear(linear: Any) -> None:
    """Make a linear's own record of its sizes agree with its weight."""
    linear.__dict__.pop("forward", None)
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
        if linear.nx == 0:
            # Its own forward cannot fold an input without columns.
            linear.__dict__["forward"] = partial(_bias_alone, linear)
    else:
        linear.out_features, linear.in_features = linear.weight.shape


def fit_attention(attention: Any, output: nn.Module, heads: int, groups: int) -> None:
    """Tell an attention module how many query heads and key-value groups it has left."""
    sizes = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": groups}
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if groups and hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads // groups
    if hasattr(attention, "split_size"):
        attention.split_size = heads * attention.head_dim
    if hasattr(attention, "qkv_proj"):
        # Where queries end in the joined projection is looked up in the configuration.
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = heads
    attention.__dict__.pop("forward", None)
    if heads == 0:
        attention.forward = partial(_no_heads, attention, output)


def _bias_alone(linear: Conv1D, x: Tensor) -> Tensor:
    bias: Tensor = linear.bias
    return bias.expand(*x.shape[:-1], -1)


def _no_heads(
    attention: Any,
    output: nn.Module,
    hidden_states: Tensor,
    *args: Any,
    past_key_values: Any = None,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What attention without heads adds: nothing but the bias of its output."""
    cache = layer_past if past_key_values is None else past_key_values
    if cache is not None:
        # Generation reads off the cache how long the text is; one number per token keeps count.
        token = hidden_states[:, None, :, :1]
        cache.update(token, token, attention.layer_idx)
    return output(hidden_states[..., :0]), None
