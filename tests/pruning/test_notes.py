"""What is said where figures mean little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from secateur.pruning.notes import notes_on_run
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.report.documents.prune import BlockReport, LinearReport

SHAPES = {"a": (32, 64), "b": (32, 128)}


def recipe(*methods: str, samples: int = 8, length: int = 16) -> Recipe:
    return Recipe.from_mapping(
        {
            "stages": [{"method": method} for method in methods],
            "calibration": {"samples": samples, "length": length, "source": "text.txt"},
        }
    )


def block(rejected: Mapping[str, int] = MappingProxyType({})) -> BlockReport:
    linear = LinearReport(zeros=5, weights=10, sparsity=0.5, rows=[], relative_error=0.1)
    linears = {"a": linear, "b": linear}
    return BlockReport(
        index=0,
        held_out_error=0.1,
        linears=linears,
        notes=["c: refit rejected, a sentence that nothing is read from"],
        rejected=dict(rejected),
        seconds={},
    )


@pytest.mark.parametrize(
    ("methods", "samples", "said"),
    [
        # Three quarters of eight windows of sixteen tokens are fewer than 128 inputs.
        (("wanda", "refit"), 8, "refit had 96 calibration tokens for linears of up to 128 inputs"),
        (("sparsegpt", "refit"), 8, "sparsegpt and refit had 96 "),
        (("admm",), 8, "admm had 96 "),
        (("wanda", "refit"), 11, None),
        (("wanda",), 8, None),
        (("magnitude",), 8, None),
    ],
)
def test_too_few_tokens_to_fit_on(methods: tuple[str, ...], samples: int, said: str | None) -> None:
    notes = notes_on_run(recipe(*methods, samples=samples), SHAPES, [block()])
    assert [said or ""] == [note[: len(said or "")] for note in notes] or (not said and not notes)


@pytest.mark.parametrize(
    ("methods", "blocks", "said"),
    [
        (("wanda", "refit"), [{"refit": 2}] * 2, "refit changed nothing"),
        (("wanda", "refit"), [{"refit": 1}] * 2, None),
        (("wanda", "reconstruct"), [{"reconstruct": 1}] * 2, "reconstruct changed nothing"),
        (("wanda", "reconstruct"), [{"reconstruct": 1}, {}], None),
    ],
)
def test_what_was_rejected_everywhere(
    methods: tuple[str, ...], blocks: list[dict[str, int]], said: str | None
) -> None:
    found = notes_on_run(recipe(*methods, samples=16), SHAPES, [block(each) for each in blocks])
    assert (len(found), said is not None) in ((1, True), (0, False))
    assert said is None or found[0].startswith(said)


def test_notes_are_in_the_report(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    few = recipe("wanda", "refit", samples=4, length=8)
    few = few.model_copy(
        update={"calibration": few.calibration.model_copy(update={"source": str(text_file)})}
    )
    report = prune(checkpoints("llama"), few, tmp_path / "out").report
    assert any(note.startswith("refit had 24 calibration tokens") for note in report.notes)
