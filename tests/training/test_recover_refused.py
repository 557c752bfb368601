"""What recovery refuses before it starts, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from secateur import Recipe, prune
from secateur.cli import app
from secateur.runs.errors import SecateurError
from secateur.training.recover import recover
from secateur.training.recovery_options import Recovery
from tiny import make_tokenizer

Pair = Callable[..., tuple[Path, Path]]


def refused(cut: Path, dense: Path, text: Path, output: Path, message: str, **values: Any) -> None:
    chosen = Recovery.from_mapping({"length": 32, "batch_tokens": 128, "tokens": 512, **values})
    with pytest.raises(SecateurError, match=message):
        recover(cut, output, chosen, teacher=dense, data=[str(text)], trust_remote_code=True)
    assert not output.exists()


def other_model(source: Path, folder: Path, **sizes: int) -> Path:
    """A random model like ``source`` but for some sizes."""
    config = AutoConfig.from_pretrained(source)
    for name, size in sizes.items():
        setattr(config, name, size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_teachers_that_cannot_teach(cut_models: Pair, text_file: Path, tmp_path: Path) -> None:
    cut, dense = cut_models("llama")
    output = tmp_path / "out"
    larger = other_model(dense, tmp_path / "larger", vocab_size=300)
    refused(cut, larger, text_file, output, "another vocabulary")
    deeper = other_model(dense, tmp_path / "deeper", num_hidden_layers=4)
    refused(cut, deeper, text_file, output, "3 blocks of hidden size 32 and the teacher 4 of 32")


def test_masks_are_not_filled(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    text = {"source": str(text_file), "samples": 4, "length": 16}
    prune(checkpoints("llama"), Recipe.from_mapping({"calibration": text}), tmp_path / "pruned")
    refused(
        tmp_path / "pruned", checkpoints("llama"), text_file, tmp_path / "out", "preset keep-mask"
    )


def test_too_little_text(cut_models: Pair, text_file: Path, tmp_path: Path) -> None:
    refused(*cut_models("llama"), text_file, tmp_path / "out", "more text", tokens=10**6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": None, "network": "none"}, "neither blocks nor the network"),
        ({"blocks": {"reference": "pruned"}}, "reference: dense"),
        ({"distillation": {"weight": 0}}, "says nothing"),
        ({"length": 64, "batch_tokens": 32}, "holds no window"),
        ({"ranks": 3}, "ranks"),
    ],
)
def test_options_that_say_nothing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Recovery.from_mapping(values)


def test_options_that_are_not_given_keep_their_values() -> None:
    chosen = Recovery.from_mapping({"distillation": {"top_k": 8}, "blocks": {"epochs": 1}})
    assert chosen.distillation.weight == Recovery().distillation.weight
    assert chosen.training.distillation.top_k == 8
    assert chosen.training.optimiser.learning_rate == 1e-3
    assert Recovery(network="full").training.optimiser.learning_rate == 1e-4


def test_the_command_prints_the_report_it_writes(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    cut, dense = cut_models("llama")
    (tmp_path / "more.yaml").write_text("validation_windows: 4\nblock_windows: 8\n")
    arguments = [
        "recover", str(cut), "--teacher", str(dense), "-o", str(tmp_path / "out"),
        "--data", str(text_file), "--tokens", "512", "--batch-tokens", "128", "--length", "32",
        "--rank", "2", "--top-k", "8", "--no-blocks", "--trust-remote-code",
        "--options", str(tmp_path / "more.yaml"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exception is None, result.exception
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    assert printed["options"]["rank"] == 2
    assert printed["options"]["blocks"] is None
    assert printed["options"]["validation_windows"] == 4
    assert printed["validation"]["after_blocks"] is None
    table = CliRunner().invoke(app, arguments).stdout
    assert "held-out loss" in table
    assert "rank 2" in table
