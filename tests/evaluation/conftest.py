"""Two models of one vocabulary: a dense one and one that has lost half of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


@pytest.fixture(scope="session")
def dense(checkpoints: Callable[..., Path]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    return model


@pytest.fixture(scope="session")
def pruned_folder(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Only weights differ from the checkpoint it was made from."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[:, ::2] = 0
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    for path in checkpoints("llama").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def pruned(pruned_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pruned_folder)
    return model


@pytest.fixture(scope="session")
def tokens_N() -> torch.Tensor:
    return torch.randint(4, 260, (100,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def small_vocabulary() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=100,
    )
    return LlamaForCausalLM(config)
