"""Flags put over a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.allocation import Uniform
from secateur.cli.flags import current_forms
from secateur.cli.recipe import read_stage, recipe_from_flags
from secateur.methods.quantize import Quantize
from secateur.methods.wanda import Wanda
from secateur.patterns.pattern import Unstructured
from secateur.pruning.recipe import Recipe, automatic_allocation, automatic_stages
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
        ({"rebuild": "swaps"}, ["wanda", "swaps", "refit"]),
        ({"method": "magnitude", "rebuild": "barber"}, ["magnitude", "barber"]),
        (
            {"method": "sparsegpt", "rebuild": "swaps", "reconstruct": True},
            ["sparsegpt", "swaps", "reconstruct"],
        ),
    ],
)
def test_stages_follow_the_flags(flags: dict[str, object], stages: list[str]) -> None:
    recipe = recipe_from_flags(**flags)  # type: ignore[arg-type]
    assert [stage.method for stage in recipe.stages] == stages


def test_flags_change_only_their_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: [{method: sparsegpt, damping: 0.5}, {method: refit, iterations: 3}]\n")
    recipe = recipe_from_flags(recipe=file, reconstruct=True, refit=True, sparsity=0.3)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "refit", "reconstruct"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    assert recipe.stages[1].iterations == 3  # type: ignore[union-attr]
    assert recipe.pattern.sparsity == 0.3
    recipe = recipe_from_flags(recipe=file, rebuild="swaps")
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "swaps", "refit"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    recipe = recipe_from_flags(recipe=file, refit=False)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]


def test_permute_of_a_file_keeps_its_options_and_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: '2:4'\nstages: [{method: permute, power: 2}, {method: sparsegpt}]\n")
    recipe = recipe_from_flags(recipe=file, permute=True)
    assert recipe.stages[0].power == 2  # type: ignore[union-attr]
    recipe = recipe_from_flags(recipe=file, permute=False)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]
    recipe = recipe_from_flags(recipe=file, permute=False, sparsity=0.5)
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]
    assert recipe.pattern == Unstructured(0.5)


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_auto_is_spelled_out_in_the_recipe(pattern: str) -> None:
    recipe = recipe_from_flags(method="auto", pattern=pattern)
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation == automatic_allocation(recipe.pattern)
    uniform = recipe_from_flags(method="auto", pattern=pattern, allocate="uniform")
    assert uniform == recipe.model_copy(update={"allocation": Uniform()})
    assert "auto" not in recipe.to_yaml().split("calibration")[0]
    with pytest.raises(SecateurError, match="leave out --rebuild, --refit"):
        recipe_from_flags(method="auto", refit=True, pattern=pattern)


def test_auto_of_a_file_follows_the_flags_and_an_allocation_of_the_file_stays(
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: auto\n")
    recipe = recipe_from_flags(recipe=file, pattern="2:4")
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation == Uniform()
    recipe = recipe_from_flags(recipe=file, method="wanda", sparsity=0.6)
    assert recipe.allocation == Uniform()
    file.write_text("allocation: owl\n")
    recipe = recipe_from_flags(recipe=file, method="auto", sparsity=0.6)
    assert recipe.stages == automatic_stages(recipe.pattern)
    assert recipe.allocation.method == "owl"


def test_quantising_comes_behind_whatever_else_was_asked_for() -> None:
    made = recipe_from_flags(
        method="besa",
        refit=True,
        quantize="int3",
        quantize_group=64,
        symmetric=False,
        quantized_format="dequantized",
    )
    assert [stage.method for stage in made.stages] == ["besa", "refit", "quantize"]
    assert made.quantize == Quantize(bits=3, group=64, symmetric=False, format="dequantized")
    automatic = recipe_from_flags(method="auto", quantize="int8")
    assert [stage.method for stage in automatic.stages][-2:] == ["reconstruct", "quantize"]
    plain = recipe_from_flags(method="wanda", quantize="int4", format="plain")
    assert plain.format == "plain"
    kept = recipe_from_flags(method="keep", quantize="int4")
    assert kept.pattern == Unstructured(0.0)


def test_quantising_flags_change_a_recipe_that_quantises(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    stages = (Wanda(), Quantize(bits=8, solver="round"))
    file.write_text(Recipe(stages=stages).to_yaml(), encoding="utf-8")
    made = recipe_from_flags(recipe=file, reconstruct=True, quantize_group=0)
    assert made.quantize == Quantize(bits=8, solver="round", group=0)
    assert [stage.method for stage in made.stages] == ["wanda", "reconstruct", "quantize"]


def test_scales_come_behind_quantising_and_stay_there(tmp_path: Path) -> None:
    made = recipe_from_flags(
        method="wanda",
        quantize="int4",
        train_scales=True,
    )
    assert [stage.method for stage in made.stages] == ["wanda", "quantize", "scales"]
    file = tmp_path / "recipe.yaml"
    file.write_text(made.to_yaml(), encoding="utf-8")
    changed = recipe_from_flags(recipe=file, refit=True, quantize_group=32)
    assert [stage.method for stage in changed.stages] == ["wanda", "refit", "quantize", "scales"]
    without = recipe_from_flags(recipe=file, train_scales=False)
    assert without.stages == made.stages[:-1]
    with pytest.raises(SecateurError, match="scales right behind it"):
        recipe_from_flags(method="wanda", train_scales=True)


def test_a_group_without_integers_is_refused() -> None:
    with pytest.raises(SecateurError, match="give --quantize int4"):
        recipe_from_flags(quantize_group=64)


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("wanda", {"method": "wanda"}),
        (
            "quantize:bits=8,symmetric=false",
            {"method": "quantize", "bits": 8, "symmetric": False},
        ),
        ("besa: clip_rate = null , penalty=1e-3", {"clip_rate": None, "penalty": "1e-3"}),
    ],
)
def test_a_stage_is_read_as_yaml_scalars(text: str, stage: dict[str, object]) -> None:
    assert stage.items() <= read_stage(text).items()


@pytest.mark.parametrize("text", ["wanda:scope", "wanda:=row", "a:b=1,b=2", "a:b=[", ":a=1"])
def test_a_stage_of_another_form_is_named(text: str) -> None:
    with pytest.raises(SecateurError, match="NAME:KEY=VALUE,KEY=VALUE"):
        read_stage(text)


def test_stages_are_the_whole_chain_in_order(tmp_path: Path) -> None:
    chain = ["wanda:scope=linear", "swaps:rounds=5", "refit", "quantize:bits=8,group=0", "scales"]
    made = recipe_from_flags(stage=chain, sparsity=0.3)
    assert [stage.method for stage in made.stages] == [each.partition(":")[0] for each in chain]
    assert made.stages[0] == Wanda(scope="linear")
    assert made.quantize == Quantize(bits=8, group=0)
    assert made.pattern == Unstructured(0.3)
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: '2:4'\nstages: [{method: sparsegpt}]\ncalibration: {seed: 4}\n")
    made = recipe_from_flags(recipe=file, stage=["magnitude"], samples=8)
    assert [stage.method for stage in made.stages] == ["magnitude"]
    assert (str(made.pattern), made.calibration.seed, made.calibration.samples) == ("2:4", 4, 8)
    assert recipe_from_flags(stage=["auto"]) == recipe_from_flags(method="auto")
    assert recipe_from_flags(stage=["keep"]).pattern == Unstructured(0.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stage": ["wanda"], "refit": True}, "--stage names the whole chain; leave out short"),
        ({"stage": ["wanda"], "method": "admm"}, "--stage names the whole chain"),
        ({"stage": ["wanda"], "quantize_group": 8}, "--stage names the whole chain"),
        ({"stage": ["wander"]}, "stages.0 names no known method 'wander'; did you mean wanda"),
        ({"stage": ["wanda:scop=row"]}, "unknown key stages.0.wanda.scop; did you mean scope"),
        (
            {"stage": ["wanda", "refit:damping=no"]},
            "stages.1.refit is not valid: damping is a number",
        ),
        ({"stage": ["refit"]}, "first stage must choose a mask"),
        ({"rebuild": "wanda"}, "wanda exchanges no weights of a mask; --rebuild takes barber or"),
        ({"quantize": "int5"}, "quantize.bits is not valid: Input should be 3, 4 or 8"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either --sparsity or --pattern"),
    ],
)
def test_flags_that_make_no_recipe_are_one_sentence(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        recipe_from_flags(**flags)


@pytest.mark.parametrize(
    ("words", "current"),
    [
        ("prune M --bos text -o O", "prune M --bos text -o O"),
        ("prune M --bos -o O", "prune M --bos window -o O"),
        ("eval M --bos", "eval M --bos window"),
        ("prune M --no-bos -o O", "prune M --bos none -o O"),
    ],
)
def test_flags_of_earlier_versions_keep_their_meaning(words: str, current: str) -> None:
    assert current_forms(words.split()) == current.split()
