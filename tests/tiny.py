"""Tiny random models of many families, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

# What each family adds to, or takes from, the common configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"head_dim": None, "tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"head_dim": None},
    "opt": {"head_dim": None, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"head_dim": None},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "mixtral": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "head_dim": None},
    "olmo2": {"head_dim": None},
    "falcon": {"head_dim": None},
    "bloom": {"head_dim": None},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text has tokens, none is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {character: 4 + index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def make_checkpoint(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> None:
    """Save a random model of the family, with its tokenizer; changes are of its configuration."""
    values = _COMMON | FAMILIES[family] | changes
    options = {k: v for k, v in values.items() if v is not None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **options), dtype=dtype
        )
        with torch.no_grad():
            # The usual initialisation is so small that blocks hardly change their input.
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
                elif "norm" in name and "weight" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
