"""What llama.cpp computes of a checkpoint: its architecture, sizes and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.models.checkpoint import Checkpoint
from secateur.models.tensors import Part
from secateur.runs.errors import SecateurError

# llama.cpp skips the attention of a block without feed-forward; channels of zeros keep it.
_LEAST_CHANNELS = 32


@dataclass(frozen=True)
class _Family:
    """How llama.cpp computes a family.

    Attributes:
        architecture: its name there.
        activation: of the feed-forwards.
        scalings: types of RoPE scaling beside the default.
        paired: positions turn neighbouring rows of a head, where transformers turns halves.
        uneven: ``deci`` computes the same with sizes for each block.
        norm_offset: what norms add to their weights, which the file holds added.
    """

    architecture: str
    activation: str = "silu"
    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    paired: bool = False
    uneven: bool = True
    norm_offset: float = 0.0


_LLAMA = _Family("llama", scalings=frozenset({"linear", "yarn", "llama3"}), paired=True)
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3", uneven=False),
    "gemma3_text": _Family(
        "gemma3",
        activation="gelu_pytorch_tanh",
        scalings=frozenset({"linear"}),
        uneven=False,
        norm_offset=1.0,
    ),
}


class BlockSizes(NamedTuple):
    """Query heads, key-value heads and feed-forward channels of a block."""

    heads: int
    groups: int
    channels: int


class TensorSource(NamedTuple):
    """A tensor of the file: its name, its shape, and what reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model as llama.cpp knows it.

    Attributes:
        name: of the architecture.
        write_keys: puts sizes and constants into a file.
        tensors: in the order of the file.
        rows: of the embedding.
    """

    name: str
    write_keys: Callable[[gguf.GGUFWriter], None]
    tensors: list[TensorSource]
    rows: int


def describe(checkpoint: Checkpoint) -> Architecture:
    """Say how llama.cpp computes a checkpoint.

    Raises:
        SecateurError: it does not, or not the same.
    """
    config = checkpoint.blocks.model.config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise SecateurError(
            f"{checkpoint.folder} holds a model of type {config.model_type}; GGUF export knows "
            f"{', '.join(_FAMILIES)}."
        )
    head_dim = int(checkpoint.blocks[0].get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
    _check_constants(checkpoint, family, head_dim)
    sizes = [_sizes(block, head_dim) for block in checkpoint.blocks]
    if len(set(sizes)) > 1 or 0 in sizes[0]:
        if not family.uneven:
            raise SecateurError(
                f"The blocks of {checkpoint.folder} differ in their sizes, which llama.cpp "
                f"computes for llama, mistral and qwen2 but not for {config.model_type}; shrink "
                "with --uniform or --padded."
            )
        family = replace(family, architecture="deci", paired=True)
        biased = bool(getattr(config, "attention_bias", False))
        sizes = [_padded(each, biased or index == 0) for index, each in enumerate(sizes)]
    tensors = _tensors(checkpoint, family, sizes, head_dim)
    if factors := _frequency_factors(config, head_dim):
        tensors.append(factors)
    return Architecture(
        family.architecture,
        partial(_write_keys, config=config, sizes=sizes, head_dim=head_dim),
        tensors,
        rows=next(each.shape[0] for each in tensors if each.name == "token_embd.weight"),
    )


def _check_constants(checkpoint: Checkpoint, family: _Family, head_dim: int) -> None:
    config = checkpoint.blocks.model.config
    wrong: list[str] = []
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != family.activation:
        wrong.append(f"the activation {activation}")
    for rope in _ropes(config).values():
        kind = rope.get("rope_type", "default")
        if kind != "default" and kind not in family.scalings:
            wrong.append(f"RoPE of type {kind}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            wrong.append("partial RoPE")
        if kind == "yarn":
            odd = {"attention_factor", "mscale", "mscale_all_dim"}
            wrong += [f"YaRN with {key}" for key in odd if rope.get(key) is not None]
            if rope.get("truncate") is False:
                wrong.append("YaRN without truncation")
    if config.model_type == "qwen3" and config.attention_bias:
        wrong.append("attention biases")
    if config.model_type == "gemma3_text":
        largest = config.num_hidden_layers == 62
        usual = config.hidden_size / config.num_attention_heads if largest else head_dim
        if config.query_pre_attn_scalar != usual:
            wrong.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}")
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias"):
            if getattr(config, key, None):
                wrong.append(key)
        if getattr(config, "use_bidirectional_attention", False):
            wrong.append("bidirectional attention")
        if _ropes(config)["sliding_attention"].get("rope_type", "default") != "default":
            wrong.append("scaled RoPE in sliding windows")
    if wrong:
        raise SecateurError(
            f"{checkpoint.folder} has {wrong[0]}, which llama.cpp does not compute for "
            f"{family.architecture}; export another model."
        )


def _sizes(block: nn.Module, head_dim: int) -> BlockSizes:
    def rows(linear: str) -> int:
        return int(block.get_parameter(f"{linear}.weight").shape[0])

    return BlockSizes(
        rows("self_attn.q_proj") // head_dim,
        rows("self_attn.k_proj") // head_dim,
        rows("mlp.gate_proj"),
    )


def _padded(sizes: BlockSizes, attends: bool) -> BlockSizes:
    """What ``deci`` computes: every block has a feed-forward, and attention if it has to.

    The first block has to, and one whose attention has a bias on its output.
    """
    heads, groups, channels = sizes
    if attends and heads == 0:
        heads = groups = 1
    return BlockSizes(heads, groups, channels or _LEAST_CHANNELS)


# Tensors.


def _tensors(
    checkpoint: Checkpoint, family: _Family, sizes: Sequence[BlockSizes], head_dim: int
) -> list[TensorSource]:
    model, blocks = checkpoint.blocks.model, checkpoint.blocks
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )
    names = gguf.get_tensor_name_map(architecture, len(blocks))
    tied = model.all_tied_weights_keys or {}

    def source(part: Part, name: str, full: str, own: BlockSizes | None) -> TensorSource:
        known = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise SecateurError(
                f"llama.cpp has no place for the tensor {full} of {checkpoint.folder}; export "
                "another model."
            )
        shape = tuple(model.get_parameter(full).shape)
        heads = 0
        if own is not None:
            shape = _shape(name, shape, own, head_dim)
            linear = name.rpartition(".")[0]
            if family.paired:
                heads = {"self_attn.q_proj": own.heads, "self_attn.k_proj": own.groups}.get(
                    linear, 0
                )
        offset = family.norm_offset if "norm" in name else 0.0
        read = partial(_read, checkpoint, part, name, shape, heads, offset)
        return TensorSource(known, shape, read)

    outside, head = checkpoint.tensors.outside, checkpoint.tensors.head
    base = model.base_model_prefix
    found = [source(outside, name, f"{base}.{name}", None) for name in outside.names]
    found += [source(head, name, name, None) for name in head.names if name not in tied]
    for index, part in enumerate(checkpoint.tensors.blocks):
        for name in part.names:
            if sizes[index].heads == 0 and name.startswith(("self_attn.", "input_layernorm.")):
                continue
            found.append(source(part, name, f"{blocks.name(index)}.{name}", sizes[index]))
    return found


def _shape(name: str, shape: tuple[int, ...], sizes: BlockSizes, head_dim: int) -> tuple[int, ...]:
    """The shape of a block's parameter, where units may have been added."""
    if 0 not in shape:
        return shape
    linear = name.rpartition(".")[0]
    width = {
        "self_attn.q_proj": sizes.heads * head_dim,
        "self_attn.k_proj": sizes.groups * head_dim,
        "self_attn.v_proj": sizes.groups * head_dim,
        "self_attn.o_proj": sizes.heads * head_dim,
    }.get(linear, sizes.channels)
    return tuple(side or width for side in shape)


def _read(
    checkpoint: Checkpoint,
    part: Part,
    name: str,
    shape: tuple[int, ...],
    heads: int,
    offset: float,
) -> Tensor:
    (tensor,) = part.read(checkpoint.reader, [name]).values()
    tensor = tensor.float()
    if tensor.shape != shape:
        return torch.zeros(shape)
    if heads:
        # Row d of the first half of a head and row d of the second become neighbours.
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor + offset if offset else tensor


# Keys.


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Parameters of RoPE by kind of block; one kind has no name."""
    rope = config.rope_parameters
    return rope if "full_attention" in rope else {"": rope}


def _frequency_factors(config: Any, head_dim: int) -> TensorSource | None:
    """What llama.cpp divides frequencies by, where no formula of its own says it."""
    rope = next(iter(_ropes(config).values()))
    if rope.get("rope_type") != "llama3":
        return None

    def read() -> Tensor:
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        factors: Tensor = rope["rope_theta"] ** -exponents / scaled
        return factors

    return TensorSource("rope_freqs.weight", (head_dim // 2,), read)


def _write_keys(
    writer: gguf.GGUFWriter, *, config: Any, sizes: Sequence[BlockSizes], head_dim: int
) -> None:
    def each(name: str) -> int | list[int]:
        values = [getattr(own, name) for own in sizes]
        return values if writer.arch == "deci" else values[0]

    window = getattr(config, "sliding_window", None)
    gemma = writer.arch == "gemma3"
    length = int(config.max_position_embeddings)
    if window and not gemma and getattr(config, "use_sliding_window", True):
        # llama.cpp attends to all of the context; within a window that is the same.
        length = min(length, int(window))
    writer.add_block_count(len(sizes))
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(each("heads"))
    writer.add_head_count_kv(each("groups"))
    writer.add_feed_forward_length(each("channels"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    ropes = _ropes(config)
    _write_rope(writer, ropes.get("full_attention") or ropes[""], config)
    if gemma:
        writer.add_sliding_window(int(config.sliding_window))
        writer.add_sliding_window_pattern(
            [kind == "sliding_attention" for kind in config.layer_types]
        )
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], config: Any) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            original = rope.get("original_max_position_embeddings")
            length = config.max_position_embeddings
            factor = rope.get("factor") or length / (original or length)
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(factor)
            writer.add_rope_scaling_orig_ctx_len(int(original or math.ceil(length / factor)))
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
