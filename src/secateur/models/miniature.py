"""A random model with the proportions of a real one, small enough to try things on."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.models.checkpoint import Checkpoint
from secateur.models.text_path import find_blocks

# Sizes in configurations, whatever the family calls them.
_SIZE = re.compile(r"(hidden_size|intermediate_size|vocab_size|_dim|_embd|_inner|_rank)$")
# Every byte, and the token that begins and ends a text.
_VOCABULARY = 257
_END = "<end>"
_SMALLEST_WIDTH = 64
_LARGEST_WIDTH = 512
_LARGEST_POWER = 6


@dataclass(frozen=True)
class Miniature:
    """A checkpoint all of whose widths are those of a real one, divided by the same number.

    Weights, hidden states and Gram matrices are products of two sizes. If every size, the length
    of the text included, is divided by d, then whatever holds them takes 1/d² of the memory.

    Attributes:
        folder: where it lies.
        divisor: d.
    """

    folder: Path
    divisor: int


def divisors(source: Checkpoint) -> list[int]:
    """Powers of two that the width of a checkpoint can be divided by, the largest first.

    None leaves a miniature wider than a few hundred, where the model is not small itself.
    """
    width = source.hidden_size
    powers = [1 << power for power in range(_LARGEST_POWER, -1, -1)]
    fitting = [d for d in powers if width % d == 0 and (d == 1 or width // d >= _SMALLEST_WIDTH)]
    return [d for d in fitting if width // d <= _LARGEST_WIDTH] or fitting[:1]


def write_miniature(
    source: Checkpoint, folder: Path, divisor: int, depth: int, *, pruned: bool = False
) -> Miniature:
    """Write a miniature of a checkpoint, with a tokenizer of bytes.

    It is of the same family where its configuration says its sizes under the usual names, else a
    Llama of as many parameters a block.

    Args:
        source: the real one.
        folder: a new folder.
        divisor: of all sizes.
        depth: most blocks.
        pruned: every other weight of its blocks is zero.
    """
    depth = min(depth, len(source.blocks))
    config = _own(source, divisor, depth) or _llama(source, divisor, depth)
    dtypes = source.reader.dtypes.values()
    dtype = max(set(dtypes), key=list(dtypes).count)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if pruned:
        prefix = f"{find_blocks(model).prefix}."
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) and parameter.ndim > 1:
                parameter.data[..., ::2] = 0
    model.to(dtype if dtype.is_floating_point else torch.float32).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return Miniature(folder, divisor)


def _own(source: Checkpoint, divisor: int, depth: int) -> PreTrainedConfig | None:
    """The configuration with its sizes divided, None if that does not divide every linear."""
    config = copy.deepcopy(source.blocks.model.config.get_text_config())
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_heterogeneous:
        return None
    values: dict[str, Any] = config.to_dict()
    blocks = len(source.blocks)
    for name, value in values.items():
        if _SIZE.search(name) and isinstance(value, int) and value >= divisor:
            values[name] = value // divisor
        elif isinstance(value, list) and len(value) == blocks:
            values[name] = value[:depth]
        elif isinstance(value, int) and value == blocks and "layer" in name:
            values[name] = depth
    values["vocab_size"] = max(values["vocab_size"], _VOCABULARY)
    try:
        small = type(config).from_dict(values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small)
    except Exception:
        # Families check their sizes in many ways; the other kind of miniature serves all.
        return None
    sizes = dict(model.named_parameters())
    for index in range(depth):
        for name, parameter in source.blocks[index].named_parameters():
            match = [sizes[full] for full in sizes if full.endswith(f".{index}.{name}")]
            if parameter.ndim < 2 or not match:
                continue
            # What comes before the two sides of a matrix is a number of experts.
            wanted = [size // divisor for size in parameter.shape[-2:]]
            if list(match[0].shape[-2:]) != wanted:
                return None
    return small


def _llama(source: Checkpoint, divisor: int, depth: int) -> PreTrainedConfig:
    """The configuration of a Llama whose blocks have as many parameters as the largest block."""
    hidden = source.hidden_size
    blocks = [source.blocks[index] for index in range(len(source.blocks))]
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    channels = max(hidden, (largest - 4 * hidden * hidden) // (3 * hidden)) // divisor
    head = 64 if hidden % 64 == 0 and divisor < 64 else divisor
    vocabulary = int(source.blocks.model.config.get_text_config().vocab_size)
    return LlamaConfig(
        hidden_size=hidden // divisor,
        # Whole groups of any pattern.
        intermediate_size=-(-channels // 16) * 16,
        num_hidden_layers=depth,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
        vocab_size=max(vocabulary // divisor, _VOCABULARY),
        tie_word_embeddings=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are single bytes."""
    symbols = [_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)
