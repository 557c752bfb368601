"""Quantised checkpoints: zeros as planned, the same logits in a fresh process, in both formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
from fresh import IDS, logits_of
from interruption import interrupted_after
from secateur.estimation import estimate as estimation
from secateur.models.formats import format
from secateur.models.masks import masks_path, read_masks
from secateur.models.reader import CheckpointReader
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from tiny import make_tokenizer

GRIDS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group": 16},
    "int4 with trained scales": {"bits": 4, "group": 16},
    "int8 by row, zero points": {"bits": 8, "group": 0, "symmetric": False},
    "int3 with zero points": {"bits": 3, "group": 32, "symmetric": False},
}


def recipe_for(
    text: Path, stages: list[dict[str, Any]], pattern: str | None = "0.5", **others: Any
) -> Recipe:
    values = {
        "stages": stages,
        "calibration": {"source": str(text), "samples": 8, "length": 32},
        "dtype": "float32",
        **({} if pattern is None else {"pattern": pattern}),
        **others,
    }
    return Recipe.from_mapping(values)


def quantize(**options: Any) -> dict[str, Any]:
    return {"method": "quantize", "bits": 4, "group": 16, **options}


def removed_weights(folder: Path) -> Tensor:
    """All saved weights that the masks beside a checkpoint say are removed."""
    reader = CheckpointReader(folder)
    removed = []
    for index in range(3):
        names = {
            name.removeprefix(f"model.layers.{index}.").removesuffix(".weight"): name
            for name in reader.files
            if name.startswith(f"model.layers.{index}.") and "proj" in name
        }
        columns = {short: reader.shapes[name][1] for short, name in names.items()}
        masks = read_masks(masks_path(folder, index), columns)
        weights = reader.read(names.values())
        removed += [weights[name][~masks[short]] for short, name in names.items()]
    return torch.cat(removed)


@pytest.fixture(scope="module")
def quantised(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """``grid, format`` -> checkpoint pruned by Wanda with refit and quantised."""
    folders = {}
    for name, options in GRIDS.items():
        dtype = torch.bfloat16 if options["bits"] == 8 else torch.float32
        for form in ("packed", "dequantized"):
            output = tmp_path_factory.mktemp("quantised") / "model"
            stages = [{"method": "wanda"}, {"method": "refit"}, quantize(**options, format=form)]
            if "trained" in name:
                stages.append({"method": "scales", "learning_rate": 0.02})
            secateur.prune(checkpoints("llama", dtype), recipe_for(text_file, stages), output)
            folders[f"{name}, {form}"] = output
    return folders


def test_both_formats_return_the_same_logits_in_a_fresh_process(
    quantised: dict[str, Path], tmp_path: Path
) -> None:
    found = logits_of(quantised, tmp_path)
    for name in quantised:
        if "packed" in name:
            assert torch.equal(found[name], found[name.replace("packed", "dequantized")]), name


def test_zeros_in_the_files_are_those_of_the_plan_and_of_rounding(
    quantised: dict[str, Path],
) -> None:
    for name, folder in quantised.items():
        counted = secateur.inspect(folder)
        plan = json.loads((folder / "plan.json").read_text())
        report = json.loads((folder / "report.json").read_text())
        assert counted.zeros == plan["zeros"] + report["sparsity"]["rounded_to_zero"], name
        assert counted.weights == plan["weights"]
        removed = removed_weights(folder)
        assert len(removed) == plan["zeros"]
        assert not removed.any()


def test_packed_weights_take_few_bits_and_read_as_the_dequantised_ones(
    quantised: dict[str, Path],
) -> None:
    for name, folder in quantised.items():
        if "packed" not in name:
            continue
        small = CheckpointReader(folder)
        plain = CheckpointReader(quantised[name.replace("packed", "dequantized")])
        assert small.shapes == plain.shapes
        assert small.dtypes == plain.dtypes
        ours, theirs = small.read(small.files), plain.read(plain.files)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        weight = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(small.mapped(weight), theirs[weight])
        assert small.bytes_of([weight]) < plain.bytes_of([weight])
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        stored = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored |= dict.fromkeys(tensors.keys(), file.name)
        assert index["weight_map"] == stored


def test_the_size_of_the_tensors_is_known_before_the_run(
    quantised: dict[str, Path],
    checkpoints: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The trial that measures memory has tests of its own.
    monkeypatch.setattr(estimation, "peak_of", lambda *_, **__: 0)
    for name, folder in quantised.items():
        grid, _, form = name.rpartition(", ")
        dtype = torch.bfloat16 if GRIDS[grid]["bits"] == 8 else torch.float32
        stages = [{"method": "wanda"}, quantize(**GRIDS[grid], format=form)]
        estimate = secateur.estimate(checkpoints("llama", dtype), recipe_for(text_file, stages))
        files = [path.read_bytes() for path in folder.glob("*.safetensors")]
        # A file begins with the length of its header.
        tensors = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)
        assert estimate.output_bytes == tensors, name
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == tensors


def test_a_packed_checkpoint_is_evaluated_and_not_pruned_again(
    quantised: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    name = "int4, packed"
    perplexities = [
        secateur.evaluate(quantised[each], text=str(text_file), window=32, max_windows=4)
        for each in (name, name.replace("packed", "dequantized"))
    ]
    assert perplexities[0].model.perplexity == perplexities[1].model.perplexity
    with pytest.raises(SecateurError, match="prune the plain, unquantised checkpoint"):
        secateur.prune(quantised[name], Recipe(), tmp_path / "again")


@pytest.mark.parametrize(
    "stages",
    [
        [{"method": "magnitude"}],
        [{"method": "admm"}],
        [{"method": "besa-rates", "steps": 1}, {"method": "refit"}],
        [{"method": "besa"}, {"method": "refit"}],
        [{"method": "wanda"}, {"method": "reconstruct", "epochs": 1}],
    ],
    ids=lambda stages: "+".join(stage["method"] for stage in stages),
)
def test_any_mask_is_quantised(
    stages: list[dict[str, Any]],
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    recipe = recipe_for(text_file, [*stages, quantize(bits=3)])
    sparsity = secateur.prune(checkpoints(), recipe, tmp_path / "out").report.sparsity
    counted = secateur.inspect(tmp_path / "out")
    assert counted.zeros == counted.weights // 2 + sparsity.rounded_to_zero
    assert not removed_weights(tmp_path / "out").any()
    for levels in distinct_values(tmp_path / "out", 16):
        assert levels <= 8


@pytest.mark.parametrize(("solver", "learned"), [("round", True), ("feedback", False)])
def test_besa_learns_clipping_where_nothing_else_makes_up_for_rounding(
    solver: str,
    learned: bool,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    recipe = recipe_for(text_file, [{"method": "besa"}, quantize(bits=3, solver=solver)])
    report = secateur.prune(checkpoints(), recipe, tmp_path / "out").report
    for block in report.blocks:
        assert any("rates and clipping" in note for note in block.notes) == learned


def distinct_values(folder: Path, group: int) -> list[int]:
    """How many values each group of one linear takes."""
    weight = CheckpointReader(folder).mapped("model.layers.2.self_attn.o_proj.weight")
    return [len(set(values.tolist())) for values in weight.reshape(-1, group)]


def test_n_m_stays_n_m(checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_for(text_file, [{"method": "wanda"}, quantize()], "2:4")
    secateur.prune(checkpoints(), recipe, tmp_path / "out")
    assert "2:4" in secateur.inspect(tmp_path / "out").patterns


def test_what_is_pruned_stays_pruned_when_it_is_quantised_later(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    first = recipe_for(text_file, [{"method": "wanda"}, {"method": "refit"}], "0.37")
    secateur.prune(checkpoints(), first, tmp_path / "pruned")
    later = recipe_for(text_file, [{"method": "keep"}, quantize()], None)
    report = secateur.prune(tmp_path / "pruned", later, tmp_path / "out").report
    before, after = removed_weights(tmp_path / "pruned"), removed_weights(tmp_path / "out")
    assert len(before) == len(after) == round(0.37 * report.sparsity.weights)
    assert not after.any()
    assert report.sparsity.target == pytest.approx(0.37, abs=1e-4)
    # Without the masks the zeros of the weights are what there is.
    for path in (tmp_path / "pruned" / "secateur" / "masks").iterdir():
        path.unlink()
    again = secateur.prune(tmp_path / "pruned", later, tmp_path / "again").report
    assert again.sparsity == report.sparsity


def test_a_dense_checkpoint_is_quantised_alone(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(text_file, [{"method": "keep"}, quantize(bits=8)], None)
    report = secateur.prune(checkpoints(), recipe, tmp_path / "out").report
    assert report.sparsity.target == 0
    assert report.sparsity.zeros == report.sparsity.rounded_to_zero
    dense = AutoModelForCausalLM.from_pretrained(checkpoints())
    with torch.no_grad():
        expected = dense(IDS).logits
    found = logits_of({"out": tmp_path / "out"}, tmp_path)["out"]
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2"])
def test_families_that_cannot_be_packed_are_refused_and_saved_dequantised(
    family: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stages = [{"method": "wanda"}, quantize(group=0)]
    recipe = recipe_for(text_file, stages)
    if family in ("gpt2", "mixtral"):
        with pytest.raises(SecateurError, match="use --quantized-format dequantized"):
            secateur.prune(checkpoints(family), recipe, tmp_path / "packed")
    else:
        secateur.prune(checkpoints(family), recipe, tmp_path / "packed")
    stages[-1]["format"] = "dequantized"
    secateur.prune(checkpoints(family), recipe_for(text_file, stages), tmp_path / "plain")
    counted = secateur.inspect(tmp_path / "plain")
    assert counted.sparsity >= 0.5
    folders = {path.name: path for path in (tmp_path / "packed", tmp_path / "plain")}
    folders = {name: path for name, path in folders.items() if path.is_dir()}
    found = logits_of(folders, tmp_path)
    assert all(torch.equal(found["plain"], logits) for logits in found.values())


def test_an_interrupted_run_ends_with_the_same_files(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(text_file, [{"method": "wanda"}, quantize(symmetric=False)])
    secateur.prune(checkpoints(), recipe, tmp_path / "whole")
    with interrupted_after(2):
        secateur.prune(checkpoints(), recipe, tmp_path / "resumed")
    secateur.prune(checkpoints(), recipe, tmp_path / "resumed")
    for path in (tmp_path / "whole").glob("model*"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_a_model_in_memory_is_quantised_in_place(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints())
    stages = [{"method": "wanda"}, quantize()]
    with pytest.raises(SecateurError, match="use --quantized-format dequantized"):
        secateur.prune(model, recipe_for(text_file, stages), tokenizer=make_tokenizer())
    stages[-1]["format"] = "dequantized"
    result = secateur.prune(model, recipe_for(text_file, stages), tokenizer=make_tokenizer())
    weight_OI = model.get_parameter("model.layers.0.mlp.up_proj.weight").data
    assert not weight_OI[~result.masks["model.layers.0.mlp.up_proj"]].any()
    kept = recipe_for(text_file, [{"method": "keep"}, quantize(format="dequantized")], None)
    again = secateur.prune(model, kept, tokenizer=make_tokenizer()).report
    assert again.sparsity.zeros >= result.report.sparsity.zeros


def test_groups_that_do_not_divide_are_refused_before_work(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(text_file, [{"method": "wanda"}, quantize(group=48)])
    with pytest.raises(SecateurError, match=r"48 columns do not divide the 32.*-group 32"):
        secateur.prune(checkpoints(), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SecateurError, match=r"48 columns do not divide the 32.*-group 32"):
        secateur.estimate(checkpoints(), recipe)


def test_packing_needs_its_package(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(format, "find_spec", lambda name: None)
    recipe = recipe_for(text_file, [{"method": "wanda"}, quantize()])
    with pytest.raises(SecateurError, match=r"install secateur\[quantize\]"):
        secateur.prune(checkpoints(), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stages", "pattern", "message"),
    [
        ([{"method": "wanda"}, quantize(), {"method": "refit"}], "0.5", "put quantize last"),
        ([{"method": "wanda"}, quantize(), {"method": "reconstruct"}], "0.5", "put quantize last"),
        ([{"method": "wanda"}, {"method": "scales"}], "0.5", "scales right behind it"),
        ([quantize()], "0.5", "first stage must choose a mask"),
        ([{"method": "keep"}, {"method": "swaps"}], None, "swaps changes the mask"),
        ([{"method": "keep"}, quantize()], "0.5", "keep removes nothing more"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    stages: list[dict[str, Any]], pattern: str | None, message: str, text_file: Path
) -> None:
    with pytest.raises(SecateurError, match=message):
        recipe_for(text_file, stages, pattern)


def test_kept_zeros_are_not_divided(text_file: Path) -> None:
    with pytest.raises(SecateurError, match="keep leaves no zeros to divide"):
        recipe_for(text_file, [{"method": "keep"}], None, allocation={"method": "owl"})
