"""Bad input: one sentence, at once, and nothing is written or lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.runs.errors import SecateurError
from tiny import make_checkpoint


def recipe(text: Path, **values: object) -> secateur.Recipe:
    calibration = {"source": str(text), "samples": 8, "length": 32}
    return secateur.Recipe.from_mapping(
        {"stages": [{"method": "wanda"}], "calibration": calibration, **values}
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patern": "2:4"}, "unknown key patern; did you mean pattern"),
        ({"held_out": 128}, "held_out is 128 of 128 samples; leave at least one to fit on"),
        ({"calibration": {"sample": 3}}, "unknown key calibration.sample; did you mean samples"),
        (
            {"stages": [{"method": "sparsegpt", "dampin": 1}]},
            "unknown key stages.0.sparsegpt.dampin; did you mean damping",
        ),
        ({"stages": [{"method": "wandaa"}]}, "no known method 'wandaa'; did you mean wanda"),
        ({"stages": [{"method": "refit"}]}, "first stage must choose a mask"),
        ({"stages": []}, "first stage must choose a mask"),
        ({"pattern": "1.0"}, r"sparsity 1\.0 is not in \[0, 1\)"),
        ({"pattern": "-0.1"}, "is not in"),
        ({"pattern": "5:4"}, "keeps 5 of every 4"),
        ({"pattern": "half"}, "'half' is not understood"),
        ({"dtype": "float16"}, "dtype is not valid"),
    ],
)
def test_recipe_errors_name_the_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        secateur.Recipe.from_mapping(values)


def test_recipe_round_trips_through_yaml(tmp_path: Path) -> None:
    made = secateur.Recipe.from_mapping(
        {"pattern": "2:4", "stages": [{"method": "sparsegpt", "damping": 0.1}, {"method": "refit"}]}
    )
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    assert secateur.Recipe.from_file(tmp_path / "recipe.yaml") == made


def test_group_must_divide_the_width(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match=r"model\.layers\.0\..*divisible by 5"):
        secateur.prune(checkpoints("llama"), recipe(text_file, pattern="2:5"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_else_is_not_touched(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(SecateurError, match="holds something that is not an interrupted run"):
            secateur.prune(checkpoints("llama"), recipe(text_file), tmp_path, restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_output_may_not_be_the_model(checkpoints: Callable[..., Path], text_file: Path) -> None:
    source = checkpoints("llama")
    with pytest.raises(SecateurError, match="is the model itself"):
        secateur.prune(source, recipe(text_file), source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    value: float, text_file: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contain NaN"):
        secateur.prune(tmp_path / "model", recipe(text_file), tmp_path / "out")


def test_activations_that_are_not_finite_name_the_block(text_file: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"model\.layers\.1"):
        secateur.prune(tmp_path / "model", recipe(text_file), tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-00002*"))


def test_windows_longer_than_the_models_positions(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    long = recipe(text_file, calibration={"source": str(text_file), "samples": 8, "length": 65})
    with pytest.raises(SecateurError, match="65 tokens are longer than the model's 64 positions"):
        secateur.prune(checkpoints("llama"), long, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encoder_decoder_is_refused(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(SecateurError, match="type t5, which is not a causal language model"):
        secateur.prune(folder, recipe(text_file), tmp_path / "out")


def test_quantised_checkpoint_is_refused(tmp_path: Path, text_file: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    path.write_text(json.dumps(config))
    with pytest.raises(SecateurError, match="quantised weights"):
        secateur.prune(tmp_path / "model", recipe(text_file), tmp_path / "out")


def test_configuration_of_another_size_is_refused(tmp_path: Path, text_file: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(SecateurError, match="do not belong together"):
        secateur.prune(tmp_path / "model", recipe(text_file), tmp_path / "out")


def test_unsupported_expert_layout_is_refused_rather_than_left_dense(
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Callable[..., Path],
) -> None:
    monkeypatch.setattr("secateur.models.experts._stack", lambda module: None)
    with pytest.raises(SecateurError, match="holds weights in a layout"):
        secateur.prune(checkpoints("mixtral"), recipe(text_file), tmp_path / "out")


def test_missing_folder_and_plain_file(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(SecateurError, match="no-such/place/at/all"):
        secateur.prune("no-such/place/at/all", recipe(text_file), tmp_path / "out")
    with pytest.raises(SecateurError, match="is a file"):
        secateur.prune(text_file, recipe(text_file), tmp_path / "out")


def test_full_disk_is_found_before_work_starts(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(SecateurError, match=r"needs .* GB and the disk"):
        secateur.prune(checkpoints("llama"), recipe(text_file), tmp_path / "out")


def test_disk_that_fills_up_leaves_a_run_that_resumes(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors import torch as writer

    real = writer.save_file

    def full(tensors: object, path: Path, **options: object) -> None:
        if "model-00002" in path.name:
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(SecateurError, match="disk is full"):
        secateur.prune(checkpoints("llama"), recipe(text_file), tmp_path / "out")
    monkeypatch.setattr(writer, "save_file", real)
    result = secateur.prune(checkpoints("llama"), recipe(text_file), tmp_path / "out")
    assert result.report.resumed_blocks == 1
