"""Linears that only and skip leave as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.models.reader import CheckpointReader
from secateur.runs.errors import SecateurError


def recipe(text: Path, **options: Any) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            "dtype": "float32",
            **options,
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.files)


@pytest.mark.parametrize(
    "options",
    [
        {"stages": "auto", "pattern": "2:4", "skip": "model.layers.0.*"},
        {"stages": [{"method": "permute"}, {"method": "wanda"}], "pattern": "2:4"},
        {"stages": [{"method": "wanda"}, {"method": "quantize", "group": 16}]},
        {"allocation": {"method": "owl"}, "skip": ["model.layers.1.*"]},
        {"allocation": {"method": "loss"}, "skip": ["model.layers.1.*"]},
    ],
)
def test_what_is_skipped_keeps_its_bytes(
    options: dict[str, Any],
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    options = {"skip": ["*.down_proj", "model.layers.0.*"], **options}
    source, output = checkpoints("qwen2"), tmp_path / "pruned"
    planned = secateur.plan(source, recipe(text_file, **options))
    report = secateur.prune(source, recipe(text_file, **options), output).report
    before, after = weights(source), weights(output)
    linears = {
        name.removesuffix(".weight")
        for name, tensor in before.items()
        if ".layers." in name and tensor.ndim == 2
    }
    left = linears - planned.weights.keys()
    assert (report.sparsity.left_dense, planned.left) == (len(left), len(left))
    for name in left:
        for own in {f"{name}.weight", f"{name}.bias"} & before.keys():
            assert torch.equal(after[own], before[own]), own
    zeros = sum(int((after[f"{name}.weight"] == 0).sum()) for name in planned.weights)
    assert report.sparsity.zeros == zeros >= sum(planned.zeros.values())
    assert report.sparsity.weights == sum(planned.weights.values())
    everything = sum(before[f"{name}.weight"].numel() for name in linears)
    assert report.sparsity.overall == pytest.approx(zeros / everything)
    assert any("left as they are" in note for note in report.notes)
    inspection = secateur.inspect(output)
    assert inspection.dense == len(left)
    if options.get("pattern") == "2:4":
        assert "2:4" in inspection.pruned_patterns
        assert inspection.patterns == []


def test_only_and_skip_choose_single_experts(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    plan = secateur.plan(
        checkpoints("mixtral"), recipe(text_file, only="*.experts.*", skip="*.experts.2.*")
    )
    experts = {name.split(".")[-2] for name in plan.weights}
    assert experts == {"0", "1", "3"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"skip": "*.foo"}, r"--skip \*.foo matches none of the 21 linears; .*model.layers"),
        ({"only": ["*", "q_proj"]}, "--only q_proj matches none"),
        ({"only": "*.q_proj", "skip": "*"}, "leave no linear"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(
    options: dict[str, Any],
    reason: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SecateurError, match=reason):
        secateur.prune(checkpoints("llama"), recipe(text_file, **options), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pruned_checkpoint_keeps_what_was_left_dense(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    secateur.prune(checkpoints("llama"), recipe(text_file, skip="model.layers.0.*"), first)
    kept = [{"method": "keep"}, {"method": "refit"}]
    report = secateur.prune(first, recipe(text_file, stages=kept), second).report
    before, after = weights(first), weights(second)
    assert all(bool(((before[name] == 0) <= (after[name] == 0)).all()) for name in before)
    assert report.sparsity.zeros == sum(int((each == 0).sum()) for each in before.values())


def test_zeros_of_the_dense_model_are_told_apart(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    first = secateur.prune(checkpoints("llama"), recipe(text_file), tmp_path / "first").report
    assert first.notes == []
    again = recipe(text_file, pattern="0.75")
    second = secateur.prune(tmp_path / "first", again, tmp_path / "second").report
    assert any("50.0% of the weights were zero before" in note for note in second.notes)
