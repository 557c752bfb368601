"""Write a random-weight Llama checkpoint of any depth, one shard in memory at a time.

    python benchmarks/random_llama.py DIR --blocks 4

The default shapes are those of a 7B Llama in bfloat16. Weights depend on the seed and the block
alone, so the first blocks of a deep checkpoint equal those of a shallow one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama model; the defaults are those of the 7B one, four blocks deep.

    Attributes:
        key_value_heads: as many as heads if None.
    """

    blocks: int = 4
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    key_value_heads: int | None = None
    vocabulary: int = 32000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of one block's linears by their name inside the block."""
        key_value = self.hidden // self.heads * (self.key_value_heads or self.heads)
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def stored_bytes(self) -> int:
        """Bytes of the bfloat16 checkpoint, norms aside."""
        block = sum(rows * columns for rows, columns in self.linears().values())
        return 2 * (self.blocks * block + 2 * self.vocabulary * self.hidden)


def write_checkpoint(
    folder: Path, shapes: Shapes, *, seed: int = 0, blocks_per_shard: int = 1
) -> None:
    """Write config, tokenizer and bfloat16 shards into a new folder.

    Args:
        folder: must not exist.
        shapes: sizes of the model.
        seed: of all weights.
        blocks_per_shard: blocks held in memory and written together.

    Raises:
        SystemExit: the disk does not hold it.
    """
    folder.mkdir(parents=True)
    need, free = shapes.stored_bytes(), shutil.disk_usage(folder).free
    if free < need:
        raise SystemExit(f"{folder} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
    LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.ffn,
        num_hidden_layers=shapes.blocks,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.key_value_heads or shapes.heads,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    shard_count = -(-shapes.blocks // blocks_per_shard) + 2
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(shapes, seed, blocks_per_shard), start=1):
        name = f"model-{number:05}-of-{shard_count:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are single bytes; it needs no training text."""
    vocabulary = {END_OF_TEXT: 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _shards(shapes: Shapes, seed: int, blocks_per_shard: int) -> Iterator[dict[str, Tensor]]:
    table = (shapes.vocabulary, shapes.hidden)
    yield {"model.embed_tokens.weight": _random(table, _generator(seed, 0))}
    for first in range(0, shapes.blocks, blocks_per_shard):
        shard: dict[str, Tensor] = {}
        for index in range(first, min(first + blocks_per_shard, shapes.blocks)):
            shard |= _block(shapes, index, seed)
        yield shard
    yield {
        "model.norm.weight": torch.ones(shapes.hidden, dtype=torch.bfloat16),
        "lm_head.weight": _random(table, _generator(seed, 1)),
    }


def _block(shapes: Shapes, index: int, seed: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}"
    generator = _generator(seed, index + 2)
    tensors = {
        f"{prefix}.{name}.weight": _random(shape, generator)
        for name, shape in shapes.linears().items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(shapes.hidden, dtype=torch.bfloat16)
    return tensors


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + part)


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(0, INITIAL_DEVIATION, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for size in fields(Shapes):
        option = "--" + size.name.replace("_", "-")
        parser.add_argument(option, type=int, default=size.default)
    parser.add_argument("--blocks-per-shard", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    folder, seed, per_shard = (options.pop(name) for name in ("folder", "seed", "blocks_per_shard"))
    write_checkpoint(folder, Shapes(**options), seed=seed, blocks_per_shard=per_shard)


if __name__ == "__main__":
    main()
