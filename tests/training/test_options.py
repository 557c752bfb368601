"""Presets, and what is said about options that are not valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.patterns.pattern import NM
from secateur.runs.errors import SecateurError
from secateur.runs.options import read_mapping
from secateur.training.options import PRESETS, Training


def test_the_paper_preset_is_the_paper() -> None:
    paper = Training.from_mapping({"tokens": 40_000 * 131_072}, "ast")
    assert (paper.steps, paper.step_windows, paper.frozen_from) == (40_000, 128, 40_000)
    assert paper.pattern == NM(2, 4)
    assert paper.masks.refresh_steps == 10
    assert (paper.masks.score, paper.masks.hysteresis) == ("magnitude", 0)
    assert (paper.decay.strength, paper.decay.ramp_share * paper.steps) == (1e-4, 10_000)
    assert (paper.distillation.weight, paper.distillation.temperature) == (0.67, 2.0)
    assert paper.optimiser.learning_rate == 2e-4
    assert paper.low_rank is None


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_json(preset: str) -> None:
    made = Training.from_mapping({"tokens": 10**6}, preset)
    assert Training.model_validate(made.model_dump(mode="json")) == made


def test_values_are_put_over_a_preset_one_by_one() -> None:
    made = Training.from_mapping({"tokens": 10**6, "masks": {"refresh_steps": 3}}, "keep-mask")
    assert made.keeps_mask
    assert made.masks.refresh_steps == 3
    assert made.frozen_from == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "tokens is not valid: Field required"),
        ({"tokens": 1000}, "1000 tokens are less than one step of 4096"),
        ({"tokens": 10**6, "batch_tokens": 512}, "512 tokens holds no window of 1024"),
        ({"tokens": 10**6, "pattern": "5:4"}, "keeps 5 of every 4"),
        (
            {"tokens": 10**6, "masks": {"refresh": 3}},
            r"unknown key masks\.refresh; did you mean refresh_steps",
        ),
        ({"tokens": 10**6, "train": "vectors"}, "use the preset keep-mask"),
        ({"tokens": 10**6, "decay": {"norm": "l1", "place": "inside"}}, "needs place: outside"),
        ({"tokens": 10**6, "masks": {"forward": "dense", "frozen_share": 0}}, "frozen_share betw"),
        ({"tokens": 10**6, "masks": {"scope": "global"}}, "2:4 compete within their group"),
        ({"tokens": 10**6, "masks": {"frozen_share": 1.0}}, "start: auto prunes a dense model"),
        (
            {"tokens": 10**6, "masks": {"forward": "dense"}, "low_rank": {"group": 8}},
            "use forward: masked",
        ),
        ({"tokens": 10**6, "admm": {"penalty": 0.1}}, "admm.*was removed; use masks"),
        ({"tokens": 10**6, "distillation": {"weight": 2}}, r"distillation\.weight is not valid"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Training.from_mapping(values)


def test_options_of_earlier_reports_are_read() -> None:
    values = {"tokens": 10**6}
    assert Training.from_mapping({**values, "admm": None}) == Training.from_mapping(values)


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(SecateurError, match="presets are default, ast, keep-mask"):
        Training.from_mapping({"tokens": 10**6}, "fast")


@pytest.mark.parametrize("content", ["- a list", "a: [", None])
def test_unreadable_options(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SecateurError, match=r"options\.yaml"):
        read_mapping(path, "training options")
