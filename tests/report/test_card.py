"""The model card in every output folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import secateur
from secateur.models.origin import Origin, read_origin
from secateur.report.card import write_card

KINDS = ["ramp", "small", "taught", "trained"]
CARD = """---
license: llama3.2
license_link: https://example.org/licence
language: [en, de]
base_model: someone/else
tags: [chat]
---
# The dense model, 19.1 on WikiText-2
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_has_a_card_that_the_hub_reads(kind: str, runs: dict[str, Path]) -> None:
    text = (runs[kind] / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "secateur" in card.data.tags
    assert card.data.license is None
    assert "name no licence" in text
    # What would differ in another session, or on another machine, is not told.
    assert not any(each in text for each in ("/tmp", str(runs[kind].parent), "peak memory", " GB"))
    own_code = kind in ("small", "taught")
    assert ("trust_remote_code=True" in text) == own_code
    for heading in ("What was done", "Figures", "How to load"):
        assert f"\n## {heading}\n" in text


def test_a_curve_has_no_card(runs: dict[str, Path]) -> None:
    assert write_card(runs["sizes"]) is None
    assert not (runs["sizes"] / "README.md").exists()


def test_figures_come_with_their_protocol_once_they_are_measured(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "other name"
    shutil.copytree(runs["ramp"], folder)
    evaluation = folder / "secateur" / "evaluation.json"
    measured = json.loads(evaluation.read_text())
    evaluation.unlink()
    assert write_card(folder) == folder / "README.md"
    before = (folder / "README.md").read_text()
    assert "Perplexity" not in before
    # The card is a function of the report files, wherever they lie.
    assert before == (runs["ramp"] / "README.md").read_text()
    evaluation.write_text(json.dumps(measured))
    secateur.write_report(folder)
    after = (folder / "README.md").read_text()
    perplexity = f"{measured['model']['perplexity']:.2f}"
    assert perplexity not in before
    assert f"| this model | {perplexity} |" in after
    assert "8 windows of 32 tokens" in after


def test_what_somebody_else_wrote_is_never_touched(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["semi"], folder)
    path = folder / "README.md"
    for text in ("mine", path.read_text().replace("secateur", "my own tool", 1)):
        path.write_text(text)
        assert write_card(folder) is None
        secateur.write_report(folder)
        assert path.read_text() == text


def test_a_finished_run_may_have_its_card_changed(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = secateur.Recipe.from_mapping(
        {"calibration": {"source": str(text_file), "samples": 4, "length": 16}}
    )
    source = tmp_path / "dense"
    shutil.copytree(checkpoints("llama"), source)
    (source / "README.md").write_text(CARD)
    secateur.prune(source, recipe, tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    card = ModelCard(path.read_text())
    assert (card.data.license, card.data.language) == ("llama3.2", ["en", "de"])
    assert card.data.license_link == "https://example.org/licence"
    # The folder is not the model that its card names as its own base.
    assert card.data.base_model is None
    assert "The dense model, 19.1" not in path.read_text()
    ours = path.read_text()
    path.write_text("mine")
    secateur.prune(source, recipe, tmp_path / "out")
    assert path.read_text() == "mine"
    path.write_text(ours)
    # Started over, the run says nothing of the old result until there is a new one.
    other = recipe.model_copy(update={"held_out": 2})
    secateur.prune(source, other, tmp_path / "out", restart=True)
    assert path.read_text() != "mine"


def test_the_name_on_the_hub_outlives_a_chain_of_runs(tmp_path: Path) -> None:
    assert read_origin("USER/some-model", None).base_model == "USER/some-model"
    assert read_origin(str(tmp_path), tmp_path) == Origin()
    snapshot = tmp_path / "models--USER--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert read_origin(str(snapshot), snapshot).base_model == "USER/some-model"


@pytest.mark.parametrize("text", ["", "---\n[\n---\n", "---\nlicense: [a]\n---\n", "\x00", "---"])
def test_a_damaged_card_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_origin(str(tmp_path), tmp_path) == Origin()
