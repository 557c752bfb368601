"""Size against expected loss."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.report.documents.shrink import SizeCurve
from secateur.runs.errors import SecateurError
from secateur.shrinking import survey
from secateur.shrinking.curve import size_curve
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink
from secateur.shrinking.source import open_source
from secateur.shrinking.units import Width, find_sub_blocks
from secateur.shrinking.widths import Penalties


def options(text_file: Path, **values: Any) -> ShrinkOptions:
    text = {"source": str(text_file), "samples": 8, "length": 32}
    plain = {"sub_models": 24, "dtype": "float32", "calibration": text}
    return ShrinkOptions.from_mapping({**plain, **values})


def test_smaller_costs_more_and_is_written_as_json_and_plot(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = checkpoints("llama")
    curve = size_curve(source, tmp_path, options(text_file))
    assert SizeCurve.model_validate_json((tmp_path / "curve.json").read_text()) == curve
    targets = [point.target for point in curve.points]
    assert targets == pytest.approx([share / 20 for share in range(1, 17)])
    for point in curve.points:
        assert 0 <= point.removed - point.target < 0.05
        assert point.blocks_after == round((1 - point.removed) * curve.blocks_before)
    for larger, smaller in pairwise(curve.points):
        assert smaller.divergence >= larger.divergence > 0
    assert len(curve.sub_models) == 24
    assert curve.forward_tokens == 8 * 32 + 24 * 64
    drawn = ElementTree.parse(tmp_path / "curve.svg").getroot()
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [17]
    assert size_curve(source, tmp_path, options(text_file)) == curve
    with pytest.raises(SecateurError, match="another result"):
        shrink(source, tmp_path, options(text_file))
    shrink(source, tmp_path, options(text_file), restart=True)
    assert not (tmp_path / "curve.json").exists()
    assert json.loads((tmp_path / "report.json").read_text())["parameters"]["removed"] >= 0.5


def test_points_say_where_query_heads_go_alone(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = checkpoints("llama")
    curve = size_curve(source, tmp_path / "queries", options(text_file))
    sub_blocks = {each.label: each for each in find_sub_blocks(open_source(source).blocks)}
    assert any(point.queries for point in curve.points)
    for point in curve.points:
        left = {
            label: Width(units, point.queries.get(label, sub_blocks[label].heads_per_unit))
            for label, units in point.widths.items()
        }
        gone = sum(
            each.parameters(each.whole) - each.parameters(left[label])
            for label, each in sub_blocks.items()
        )
        assert gone == curve.blocks_before - point.blocks_after
        assert all(point.widths[label] for label in point.queries)
    whole = size_curve(source, tmp_path / "whole", options(text_file, whole_groups=True))
    assert not any(point.queries for point in whole.points)


def test_sizes_that_feed_forwards_cannot_reach_are_left_out(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    curve = size_curve(checkpoints("llama"), tmp_path, options(text_file, ffn_only=True))
    # Nor those that none of the sub-models came near.
    assert 0.5 < curve.points[-1].target < 0.7
    assert curve.points[-1].widths.keys() == {"0.ffn", "1.ffn", "2.ffn"}


@pytest.mark.parametrize("values", [{"preset": "paper"}, {"form": "uniform"}])
def test_curves_of_other_kinds_are_refused(
    values: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match="leave out --preset"):
        size_curve(checkpoints("llama"), tmp_path / "out", ShrinkOptions.from_mapping(values))
    assert not (tmp_path / "out").exists()


def test_expectations_that_deserve_no_trust_are_said_to(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = survey.fit_penalties
    monkeypatch.setattr(
        survey, "fit_penalties", lambda *found: Penalties(fit(*found).nats, explained=-0.1)
    )
    text = ["--calibration", str(text_file), "--samples", "8", "--length", "32"]
    result = CliRunner().invoke(
        app,
        ["shrink", str(checkpoints("llama")), "-o", str(tmp_path / "out"), "--curve",
         "--sub-models", "8", *text],
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Do not trust the expected divergences" in result.stderr
    (note,) = json.loads((tmp_path / "out" / "curve.json").read_text())["notes"]
    assert "--sub-models" in note
