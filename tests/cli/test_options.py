"""Flags put over a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.allocation import Uniform
from secateur.cli.options import Integers, QuantizedFormat, Rebuild, recipe_from_flags
from secateur.methods.quantize import Quantize
from secateur.methods.wanda import Wanda
from secateur.patterns.pattern import Unstructured
from secateur.pruning.auto import automatic_allocation, automatic_stages
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({}, ["wanda", "refit"]),
        ({"refit": False}, ["wanda"]),
        ({"reconstruct": True}, ["wanda", "refit", "reconstruct"]),
        ({"method": "besa"}, ["besa"]),
        ({"method": "admm", "reconstruct": True}, ["admm", "reconstruct"]),
        ({"method": "besa-rates", "refit": True}, ["besa-rates", "refit"]),
        ({"permute": True, "pattern": "2:4"}, ["permute", "wanda", "refit"]),
        (
            {"method": "admm", "permute": True, "reconstruct": True, "pattern": "2:4"},
            ["permute", "admm", "reconstruct"],
        ),
        ({"method": "auto", "permute": True, "pattern": "2:4"}, ["permute", "admm", "reconstruct"]),
        ({"permute": False}, ["wanda", "refit"]),
        ({"rebuild": Rebuild.SWAPS}, ["wanda", "swaps", "refit"]),
        ({"method": "magnitude", "rebuild": Rebuild.BARBER}, ["magnitude", "barber"]),
        (
            {"method": "sparsegpt", "rebuild": Rebuild.SWAPS, "reconstruct": True},
            ["sparsegpt", "swaps", "reconstruct"],
        ),
    ],
)
def test_stages_follow_the_flags(flags: dict[str, object], stages: list[str]) -> None:
    flags = {"sparsity": None, "pattern": None} | flags
    recipe = recipe_from_flags(None, **flags)  # type: ignore[arg-type]
    assert [stage.method for stage in recipe.stages] == stages


def test_flags_change_only_their_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: [{method: sparsegpt, damping: 0.5}, {method: refit, iterations: 3}]\n")
    recipe = recipe_from_flags(file, reconstruct=True, refit=True, sparsity=0.3, pattern=None)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "refit", "reconstruct"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    assert recipe.stages[1].iterations == 3  # type: ignore[union-attr]
    assert recipe.pattern.sparsity == 0.3
    recipe = recipe_from_flags(file, rebuild=Rebuild.SWAPS, sparsity=None, pattern=None)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "swaps", "refit"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    recipe = recipe_from_flags(file, refit=False, sparsity=None, pattern=None)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]


def test_permute_of_a_file_keeps_its_options_and_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: '2:4'\nstages: [{method: permute, power: 2}, {method: sparsegpt}]\n")
    recipe = recipe_from_flags(file, permute=True, sparsity=None, pattern=None)
    assert recipe.stages[0].power == 2  # type: ignore[union-attr]
    recipe = recipe_from_flags(file, permute=False, sparsity=None, pattern=None)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]
    recipe = recipe_from_flags(file, permute=False, sparsity=0.5, pattern=None)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]
    assert recipe.pattern == Unstructured(0.5)


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_auto_is_spelled_out_in_the_recipe(pattern: str) -> None:
    recipe = recipe_from_flags(None, method="auto", sparsity=None, pattern=pattern)
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation == automatic_allocation(recipe.pattern)
    uniform = recipe_from_flags(
        None, method="auto", sparsity=None, pattern=pattern, allocate="uniform"
    )
    assert uniform == recipe.model_copy(update={"allocation": Uniform()})
    assert "auto" not in recipe.to_yaml().split("calibration")[0]
    with pytest.raises(SecateurError, match="leave out --rebuild, --refit"):
        recipe_from_flags(None, method="auto", refit=True, sparsity=None, pattern=pattern)


def test_auto_of_a_file_follows_the_flags_and_an_allocation_of_the_file_stays(
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: auto\n")
    recipe = recipe_from_flags(file, sparsity=None, pattern="2:4")
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation == Uniform()
    recipe = recipe_from_flags(file, method="wanda", sparsity=0.6, pattern=None)
    assert recipe.allocation == Uniform()
    file.write_text("allocation: owl\n")
    recipe = recipe_from_flags(file, method="auto", sparsity=0.6, pattern=None)
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation.method == "owl"


def test_quantising_comes_behind_whatever_else_was_asked_for() -> None:
    made = recipe_from_flags(
        None,
        method="besa",
        refit=True,
        sparsity=None,
        pattern=None,
        quantize=Integers.INT3,
        quantize_group=64,
        asymmetric=True,
        quantized_format=QuantizedFormat.DEQUANTIZED,
    )
    assert [stage.method for stage in made.stages] == ["besa", "refit", "quantize"]
    assert made.quantize == Quantize(bits=3, group=64, symmetric=False, format="dequantized")
    automatic = recipe_from_flags(
        None, method="auto", sparsity=None, pattern=None, quantize=Integers.INT8
    )
    assert [stage.method for stage in automatic.stages][-2:] == ["reconstruct", "quantize"]
    kept = recipe_from_flags(
        None, method="keep", sparsity=None, pattern=None, quantize=Integers.INT4
    )
    assert kept.pattern == Unstructured(0.0)


def test_quantising_flags_change_a_recipe_that_quantises(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    stages = (Wanda(), Quantize(bits=8, solver="round"))
    file.write_text(Recipe(stages=stages).to_yaml(), encoding="utf-8")
    made = recipe_from_flags(file, reconstruct=True, sparsity=None, pattern=None, quantize_group=0)
    assert made.quantize == Quantize(bits=8, solver="round", group=0)
    assert [stage.method for stage in made.stages] == ["wanda", "reconstruct", "quantize"]


def test_scales_come_behind_quantising_and_stay_there(tmp_path: Path) -> None:
    made = recipe_from_flags(
        None,
        method="wanda",
        sparsity=None,
        pattern=None,
        quantize=Integers.INT4,
        train_scales=True,
    )
    assert [stage.method for stage in made.stages] == ["wanda", "quantize", "scales"]
    file = tmp_path / "recipe.yaml"
    file.write_text(made.to_yaml(), encoding="utf-8")
    changed = recipe_from_flags(file, refit=True, sparsity=None, pattern=None, quantize_group=32)
    assert [stage.method for stage in changed.stages] == ["wanda", "refit", "quantize", "scales"]
    without = recipe_from_flags(file, sparsity=None, pattern=None, train_scales=False)
    assert without.stages == made.stages[:-1]
    with pytest.raises(SecateurError, match="scales right behind it"):
        recipe_from_flags(None, method="wanda", sparsity=None, pattern=None, train_scales=True)


def test_a_group_without_integers_is_refused() -> None:
    with pytest.raises(SecateurError, match="give --quantize int4"):
        recipe_from_flags(None, sparsity=None, pattern=None, quantize_group=64)
