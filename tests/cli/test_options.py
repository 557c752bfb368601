"""Flags put over a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.automatic import automatic_stages
from secateur.cli.options import Rebuild, recipe_from_flags
from secateur.errors import SecateurError


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({}, ["wanda", "refit"]),
        ({"refit": False}, ["wanda"]),
        ({"reconstruct": True}, ["wanda", "refit", "reconstruct"]),
        ({"method": "besa"}, ["besa"]),
        ({"method": "admm", "reconstruct": True}, ["admm", "reconstruct"]),
        ({"method": "besa-rates", "refit": True}, ["besa-rates", "refit"]),
        ({"rebuild": Rebuild.SWAPS}, ["wanda", "swaps", "refit"]),
        ({"method": "magnitude", "rebuild": Rebuild.BARBER}, ["magnitude", "barber"]),
        (
            {"method": "sparsegpt", "rebuild": Rebuild.SWAPS, "reconstruct": True},
            ["sparsegpt", "swaps", "reconstruct"],
        ),
    ],
)
def test_stages_follow_the_flags(flags: dict[str, object], stages: list[str]) -> None:
    recipe = recipe_from_flags(None, sparsity=None, pattern=None, calibration={}, **flags)  # type: ignore[arg-type]
    assert [stage.method for stage in recipe.stages] == stages


def test_flags_change_only_their_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: [{method: sparsegpt, damping: 0.5}, {method: refit, iterations: 3}]\n")
    recipe = recipe_from_flags(
        file, reconstruct=True, refit=True, sparsity=0.3, pattern=None, calibration={}
    )
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "refit", "reconstruct"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    assert recipe.stages[1].iterations == 3  # type: ignore[union-attr]
    assert recipe.pattern.sparsity == 0.3
    recipe = recipe_from_flags(
        file, rebuild=Rebuild.SWAPS, sparsity=None, pattern=None, calibration={}
    )
    assert [stage.method for stage in recipe.stages] == ["sparsegpt", "swaps", "refit"]
    assert recipe.stages[0].damping == 0.5  # type: ignore[union-attr]
    recipe = recipe_from_flags(file, refit=False, sparsity=None, pattern=None, calibration={})
    assert [stage.method for stage in recipe.stages] == ["sparsegpt"]


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_auto_is_spelled_out_in_the_recipe(pattern: str) -> None:
    recipe = recipe_from_flags(None, method="auto", sparsity=None, pattern=pattern, calibration={})
    assert recipe.stages == automatic_stages()
    assert "auto" not in recipe.to_yaml().split("calibration")[0]
    with pytest.raises(SecateurError, match="leave out --rebuild, --refit"):
        recipe_from_flags(
            None, method="auto", refit=True, sparsity=None, pattern=pattern, calibration={}
        )
