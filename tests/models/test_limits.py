"""Positions and embedding rows, under whatever name a family has them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from secateur.models.structure import check_length, embedding_rows, positions_of
from secateur.runs.errors import SecateurError


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 64}, 64),
        ("gptj", {"n_positions": 64}, 64),
        ("codegen", {"n_positions": 64}, 64),
        # Distances have no end; MPT builds its own for a length that it names.
        ("mpt", {"max_seq_len": 64}, 64),
        ("dbrx", {"max_seq_len": 64}, 64),
        ("falcon", {"alibi": True, "max_position_embeddings": 64}, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 64}, 64),
        ("bloom", {"seq_length": 64}, None),
        ("xlnet", {}, None),
        ("mamba", {}, None),
        ("whisper", {"max_target_positions": 64}, 64),
        # Two of the rows of its embedding stand before the first position.
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("gemma3", {"text_config": {"max_position_embeddings": 64}}, 64),
    ],
)
def test_positions(family: str, values: dict[str, Any], expected: int | None) -> None:
    config = AutoConfig.for_model(family, **values)
    assert positions_of(config) == expected
    if expected is None:
        check_length(config, 10**6)
        return
    check_length(config, 64)
    with pytest.raises(SecateurError, match="of 65 tokens are longer than the model's 64"):
        check_length(config, 65)


def test_code_of_a_checkpoints_own() -> None:
    class Own(PreTrainedConfig):
        def __init__(self, seq_length: int = 64, **others: Any) -> None:
            self.seq_length = seq_length
            super().__init__(**others)

    assert positions_of(Own(seq_length=32)) == 32


def test_rows_are_those_of_the_input_embedding() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 33}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))
    assert embedding_rows(model) == 33
    model.resize_token_embeddings(40)
    assert embedding_rows(model) == 40
