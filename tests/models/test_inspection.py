from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import families
import secateur
from secateur.models.inspection import format_fits
from tiny import make_checkpoint, make_tokenizer


def test_dense_checkpoint_has_no_zeros(checkpoints: Callable[..., Path]) -> None:
    inspection = secateur.inspect(checkpoints("llama"))
    assert (inspection.zeros, inspection.patterns) == (0, [])
    assert len(inspection.linears) == 3 * 7
    assert all("layers" in linear.name for linear in inspection.linears)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    ],
)
def test_zeros_are_counted_where_they_are(family: str, name: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    # GPT-2 stores (in, out): input columns are the first dimension of its file.
    weight_OI = tensors[name].T if family == "gpt2" else tensors[name]
    weight_OI[:, ::4] = 0
    weight_OI[:, 1::4] = 0
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    inspection = secateur.inspect(tmp_path / "model")
    pruned = next(linear for linear in inspection.linears if linear.name == name)
    assert pruned.sparsity == 0.5
    assert "2:4" in pruned.patterns
    assert inspection.zeros == pruned.zeros
    assert inspection.patterns == []


def test_convolutions_and_states_are_no_linears(text_file: Path, tmp_path: Path) -> None:
    families.build("mamba2").save_pretrained(tmp_path / "model")
    recipe = secateur.Recipe.from_mapping(
        {
            "pattern": "2:4",
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            "dtype": "float32",
        }
    )
    report = secateur.prune(
        tmp_path / "model", recipe, tmp_path / "pruned", tokenizer=make_tokenizer()
    ).report
    inspection = secateur.inspect(tmp_path / "pruned")
    assert {linear.name.split(".mixer.")[1] for linear in inspection.linears} == {
        "in_proj.weight",
        "out_proj.weight",
    }
    assert inspection.sparsity == report.sparsity.counted == 0.5
    assert inspection.patterns == ["2:4", "4:8"]


def test_formats_are_held_against_rows_and_kernels_against_both_sides() -> None:
    shapes = [(576, 1024), (1024, 576), (1093, 576), (576, 1093), (64, 32, 256), (32, 0), (48, 32)]
    fits = {each.name: (each.fit, each.linears) for each in format_fits(shapes)}
    assert list(fits.values()) == [(5, 6), (2, 6), (3, 6)]
    assert all("llama.cpp" in name or "vLLM" in name for name in fits)
