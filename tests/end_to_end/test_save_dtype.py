"""The dtype of what is saved, and how its configuration says positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

import secateur
from secateur.models.reader import CheckpointReader
from secateur.runs.errors import SecateurError
from secateur.training.options import Training
from secateur.training.recovery_options import Recovery

CALIBRATION = {"samples": 8, "length": 16}


def recipe(text_file: Path, **values: Any) -> secateur.Recipe:
    calibration = {"source": str(text_file), **CALIBRATION}
    return secateur.Recipe.from_mapping(
        {"pattern": "0.5", "dtype": "float32", "calibration": calibration, **values}
    )


def small(text_file: Path, **values: Any) -> secateur.ShrinkOptions:
    calibration = {"source": str(text_file), **CALIBRATION}
    return secateur.ShrinkOptions.from_mapping(
        {"form": "uniform", "dtype": "float32", "calibration": calibration, **values}
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.files)


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.fixture(scope="module")
def rounded(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 checkpoint, saved in bf16 by transformers."""
    folder = tmp_path_factory.mktemp("rounded")
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in checkpoints("llama").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_the_result_is_that_of_the_model_saved_so_before(
    command: str, checkpoints: Callable[..., Path], rounded: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, source, dtype in (
        ("cast", checkpoints("llama"), "bfloat16"),
        ("before", rounded, "source"),
    ):
        if command == "prune":
            secateur.prune(source, recipe(text_file, save_dtype=dtype), tmp_path / name)
        else:
            secateur.shrink(source, tmp_path / name, small(text_file, save_dtype=dtype))
    cast, before = tensors(tmp_path / "cast"), tensors(tmp_path / "before")
    assert cast.keys() == before.keys()
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}
    assert all(torch.equal(cast[name], before[name]) for name in cast)
    assert config(tmp_path / "cast")["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cast")
    assert loaded.dtype == torch.bfloat16


def test_training_and_recovery_save_so_too(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = checkpoints("llama")
    options = {
        "tokens": 128, "length": 16, "batch_tokens": 32, "validation_windows": 4,
        "dtype": "float32", "save_dtype": "bfloat16",
    }  # fmt: skip
    secateur.train(
        source, Training.from_mapping(options, "ast"), tmp_path / "trained", data=[str(text_file)]
    )
    secateur.recover(
        source,
        tmp_path / "recovered",
        Recovery.from_mapping({**options, "network": "full", "blocks": None}),
        teacher=source,
        data=[str(text_file)],
    )
    for name in ("trained", "recovered"):
        assert {each.dtype for each in tensors(tmp_path / name).values()} == {torch.bfloat16}
        assert config(tmp_path / name)["dtype"] == "bfloat16"


def test_packed_integers_have_their_embedding_in_16_bits(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stages = [{"method": "wanda"}, {"method": "quantize", "bits": 4, "group": 8}]
    secateur.prune(
        checkpoints("llama"), recipe(text_file, stages=stages, save_dtype="bfloat16"), tmp_path
    )
    files = {}
    for path in tmp_path.glob("*.safetensors"):
        files |= load_file(path)
    assert any("packed" in name for name in files)
    floating = {each.dtype for each in files.values() if each.is_floating_point()}
    assert floating == {torch.bfloat16}


def test_numbers_that_a_dtype_cannot_hold_are_named_and_others_stay(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    model.save_pretrained(source)
    for path in checkpoints("llama").glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].double()
    save_file(held, source / "model.safetensors", {"format": "pt"})
    kept = CheckpointReader(source, cast=torch.bfloat16)
    assert kept.dtypes.pop("model.norm.weight") == torch.float64
    assert set(kept.dtypes.values()) == {torch.bfloat16}
    held["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SecateurError, match=r"model\.embed_tokens\.weight .* float16"):
        secateur.prune(source, recipe(text_file, save_dtype="float16"), tmp_path / "out")


def test_a_model_in_memory_keeps_its_dtype(
    checkpoints: Callable[..., Path],
    tokenizer: PreTrainedTokenizerBase,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    chosen = recipe(text_file, save_dtype="bfloat16")
    with pytest.raises(SecateurError, match="convert it"):
        secateur.prune(model, chosen, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_positions_are_said_for_old_readers_and_new_ones(
    family: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = checkpoints(family)
    secateur.shrink(source, tmp_path, small(text_file, form="uneven", sub_models=8))
    said = config(tmp_path)
    if family == "gemma3_text":
        # Its blocks have positions of two kinds, for which there is no one number.
        assert "rope_theta" not in said
    else:
        assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 10_000
    before, after = (
        AutoConfig.from_pretrained(folder, trust_remote_code=True).rope_parameters
        for folder in (source, tmp_path)
    )
    assert before == after


def test_a_configuration_of_an_older_transformers_learns_the_newer_words(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "old"
    AutoModelForCausalLM.from_pretrained(checkpoints("llama")).save_pretrained(source)
    for path in checkpoints("llama").glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    old = config(source)
    del old["rope_parameters"]
    scaling = {"rope_type": "linear", "factor": 2.0}
    old |= {"rope_theta": 5000.0, "rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(old))
    secateur.prune(source, recipe(text_file), tmp_path / "out")
    said = config(tmp_path / "out")
    assert said["rope_parameters"] == {**scaling, "rope_theta": 5000.0}
    assert {name: said[name] for name in old} == old
