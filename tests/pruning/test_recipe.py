"""Where stages may stand in a recipe, as their classes say."""

from __future__ import annotations

import pytest

from secateur.methods import STAGES
from secateur.patterns.pattern import parse_pattern
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError


def chain_with(method: str) -> list[dict[str, str]]:
    """The shortest chain that a stage can stand in."""
    stage = STAGES[method]
    names = [method]
    if stage.follows:
        names.insert(0, stage.follows)
    if not stage.chooses_mask:
        names.insert(1 if stage.comes_first else 0, "wanda")
    return [{"method": name} for name in names]


@pytest.mark.parametrize("method", STAGES)
def test_every_stage_has_its_place(method: str) -> None:
    values = {"stages": chain_with(method)}
    pattern = {"pattern": "2:4"} if STAGES[method].comes_first else {}
    made = Recipe.from_mapping(values | pattern)
    assert method in [stage.method for stage in made.stages]
    assert STAGES[method].prunes_nothing == (made.pattern == parse_pattern("0"))


@pytest.mark.parametrize("method", [name for name, stage in STAGES.items() if stage.comes_last])
def test_nothing_but_a_follower_comes_behind_the_last(method: str) -> None:
    for other, stage in STAGES.items():
        chain = [*chain_with(method), {"method": other}]
        if stage.follows == method:
            Recipe.from_mapping({"stages": chain})
        else:
            with pytest.raises(SecateurError, match=f"put {method} last|must come first"):
                Recipe.from_mapping({"stages": chain})


def test_masks_of_the_checkpoint_stay() -> None:
    for name, stage in STAGES.items():
        if stage.keeps_mask and stage.follows is None:
            Recipe.from_mapping({"stages": [{"method": "keep"}, {"method": name}]})
        elif not stage.comes_first and stage.follows is None:
            with pytest.raises(SecateurError, match=f"{name} changes the mask that keep is to"):
                Recipe.from_mapping({"stages": [{"method": "keep"}, {"method": name}]})


def test_an_optimiser_that_is_not_installed_is_said_before_work_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secateur.methods.besa.find_spec", lambda name: None)
    Recipe.from_mapping({"stages": [{"method": "besa"}]})
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[paper\]'"):
        Recipe.from_mapping({"stages": [{"method": "besa", "optimiser": "prodigy"}]})
