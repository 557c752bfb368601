"""Files of text, a tiny model that can write, and tokenizers with other special tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write documents as JSON lines, compressed if the name says so."""

    def write(texts: list[str], name: str = "texts.jsonl") -> Path:
        path = tmp_path / name
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        return path

    return write


@pytest.fixture(scope="session")
def writer(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A random model whose distribution is far from uniform, in fp32."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def bare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that has no special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
