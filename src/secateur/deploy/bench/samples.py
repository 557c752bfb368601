"""Random Llamas of a few shapes, in the files of several runtimes, to see what pays here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secateur.runs.files import write_json

Array = npt.NDArray[np.float32]

POSITIONS = 256
_HEAD = 64
# A token for every byte, behind three with a meaning of their own.
_WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Sample:
    """A model's sizes; the weights of its linears are kept as ``n:m`` says, all if None."""

    width: int = 1024
    channels: int = 2816
    heads: int = 16
    groups: int = 4
    blocks: int = 4
    head: int = _HEAD
    keep: tuple[int, int] | None = None

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Names of transformers, and random fp32 weights of shape (out, in)."""
        draw = np.random.default_rng(0)
        queries, keys = self.heads * self.head, self.groups * self.head
        linears = {
            "self_attn.q_proj": (queries, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, queries),
            "mlp.gate_proj": (self.channels, self.width),
            "mlp.up_proj": (self.channels, self.width),
            "mlp.down_proj": (self.width, self.channels),
        }
        yield "model.embed_tokens.weight", _random(draw, (len(_WORDS), self.width))
        for block in range(self.blocks):
            for name, shape in linears.items():
                w_OI = _random(draw, shape)
                if self.keep is not None:
                    w_OI = _pruned(draw, w_OI, *self.keep)
                yield f"model.layers.{block}.{name}.weight", w_OI
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{block}.{name}.weight", np.ones(self.width, np.float32)
        yield "model.norm.weight", np.ones(self.width, np.float32)
        yield "lm_head.weight", _random(draw, (len(_WORDS), self.width))

    @property
    def parameters(self) -> int:
        """Weights of the linears in the blocks."""
        attention = 2 * (self.heads + self.groups) * self.head
        return self.blocks * self.width * (attention + 3 * self.channels)


def write_folder(folder: Path, sample: Sample) -> None:
    """A checkpoint for transformers."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(dict(sample.tensors()), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": sample.width,
        "intermediate_size": sample.channels,
        "num_hidden_layers": sample.blocks,
        "num_attention_heads": sample.heads,
        "num_key_value_heads": sample.groups,
        "head_dim": sample.head,
        "vocab_size": len(_WORDS),
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)


def write_gguf(path: Path, sample: Sample, form: str = "F16") -> None:
    """A file for llama.cpp, its matrices as F32, F16, Q8_0 or Q4_0."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[form]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType[f"ALL_{form}" if form == "F32" else f"MOSTLY_{form}"])
    writer.add_block_count(sample.blocks)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(sample.width)
    writer.add_feed_forward_length(sample.channels)
    writer.add_head_count(sample.heads)
    writer.add_head_count_kv(sample.groups)
    writer.add_key_length(sample.head)
    writer.add_value_length(sample.head)
    writer.add_rope_dimension_count(sample.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_WORDS)
    writer.add_token_scores([0.0] * len(_WORDS))
    meanings = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*meanings, *[TokenType.BYTE] * 256, TokenType.NORMAL])
    for name, values in sample.tensors():
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            writer.add_tensor(_gguf_name(name), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    block, _, rest = stem.removeprefix("model.layers.").partition(".")
    if block.isdecimal():
        return f"blk.{block}.{_GGUF_NAMES[rest]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def _random(draw: np.random.Generator, shape: tuple[int, int]) -> Array:
    return (0.02 * draw.standard_normal(shape, np.float32)).astype(np.float32)


def _pruned(draw: np.random.Generator, w_OI: Array, kept: int, of: int) -> Array:
    """Keep so many of each few consecutive weights of a row, drawn at random."""
    rank_OGM = draw.random((w_OI.shape[0], w_OI.shape[1] // of, of)).argsort(-1)
    return w_OI * (rank_OGM < kept).reshape(w_OI.shape)
