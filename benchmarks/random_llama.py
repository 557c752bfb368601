"""Random Llamas: a checkpoint of any depth, written a block at a time, or a block in memory.

    python benchmarks/random_llama.py DIR --blocks 4

The default shapes are those of a 7B Llama in bfloat16. Weights depend on the seed and the block
alone, so the first blocks of a deep checkpoint equal those of a shallow one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

END_OF_TEXT = "<|endoftext|>"
# Of the 7B Llama; the key-value heads are as many as the heads unless they are given.
SIZES = {
    "blocks": 4,
    "hidden": 4096,
    "ffn": 11008,
    "heads": 32,
    "key_value_heads": None,
    "vocabulary": 32000,
}
SMOLLM2 = {"hidden": 576, "ffn": 1536, "heads": 9, "key_value_heads": 3}


def write_checkpoint(folder: Path, *, seed: int = 0, per_shard: int = 1, **sizes: int) -> None:
    """Write config, tokenizer and bfloat16 shards into a new folder; ``sizes`` as in ``SIZES``."""
    size = SIZES | sizes
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["key_value_heads"] or size["heads"],
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    shards = -(-config.num_hidden_layers // per_shard) + 2
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(config, seed, per_shard), start=1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        if shutil.disk_usage(folder).free < sum(tensor.nbytes for tensor in tensors.values()):
            raise SystemExit(f"The disk of {folder} is full.")
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def random_block(
    given: argparse.Namespace, sequences: int, device: torch.device
) -> tuple[LlamaDecoderLayer, Tensor, tuple[Tensor, Tensor]]:
    """A block without gradients, its random inputs and the embedding of their positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_attention_heads=given.heads,
        num_key_value_heads=given.key_value_heads,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, layer_idx=0).to(device).requires_grad_(False)
    x_SLD = torch.randn(sequences, given.tokens, given.hidden, device=device)
    positions = torch.arange(given.tokens, device=device)[None]
    return block, x_SLD, LlamaRotaryEmbedding(config).to(device)(x_SLD, positions)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes; it needs no training text."""
    symbols = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _shards(config: LlamaConfig, seed: int, per_shard: int) -> Iterator[dict[str, Tensor]]:
    table = (config.vocab_size, config.hidden_size)
    yield {"model.embed_tokens.weight": _random(table, _generator(seed, 0))}
    for first in range(0, config.num_hidden_layers, per_shard):
        last = min(first + per_shard, config.num_hidden_layers)
        blocks = [_block(config, index, seed) for index in range(first, last)]
        yield {name: tensor for block in blocks for name, tensor in block.items()}
    yield {
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
        "lm_head.weight": _random(table, _generator(seed, 1)),
    }


def _block(config: LlamaConfig, index: int, seed: int) -> dict[str, Tensor]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    generator = _generator(seed, index + 2)
    tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[norm] = torch.ones(hidden, dtype=torch.bfloat16)
    return {f"model.layers.{index}.{name}.weight": tensor for name, tensor in tensors.items()}


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + part)


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for name, value in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--blocks-per-shard", type=int, default=1, dest="per_shard")
    parser.add_argument("--seed", type=int, default=0)
    write_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
