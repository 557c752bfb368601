"""What pays here, on models that are too small to tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.deploy import targets as module
from secateur.deploy.bench.samples import Sample
from secateur.deploy.targets import Gain
from secateur.report.documents.bench import Ratio

pytest.importorskip("xllamacpp")

TINY = Sample(width=64, channels=128, heads=4, groups=2, head=16, blocks=2)


@pytest.mark.slow
def test_everything_is_tried_in_every_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, sample in (
        ("DENSE", TINY),
        ("_ZEROS", replace(TINY, keep=(32, 64))),
        ("_SEMI", replace(TINY, keep=(2, 4))),
        ("_SMALLER", replace(TINY, channels=64)),
    ):
        monkeypatch.setattr(module, name, sample)
    protocol = {"prefill": 16, "prompt": 8, "decode": 4, "batch": 1, "limit": 0.01}
    monkeypatch.setattr(module, "_PROTOCOL", protocol)
    done = CliRunner().invoke(app, ["targets", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = secateur.Targets.model_validate(json.loads(done.stdout))
    assert [(gain.row, gain.runtime) for gain in found.gains] == [
        *((row, "transformers") for row in module.ROWS[:3]),
        *((row, "llama.cpp") for row in (*module.ROWS, module.ROWS[3])),
    ]
    assert found.runtimes["transformers"] is not None
    assert all(gain.decode and gain.prefill for gain in found.gains)


def test_a_verdict_is_no_surer_than_its_interval() -> None:
    def verdict(low: float, high: float) -> str:
        ratio = Ratio(base="dense", median=(low + high) / 2, interval=(low, high), range=(0, 9))
        return Gain(row="2:4", runtime="some", what="it", decode=ratio, prefill=None).verdict

    assert verdict(1.2, 1.3) == "gains in decode"
    assert verdict(0.98, 1.02) == "nothing"
    assert verdict(0.7, 0.8) == "nothing"
    assert verdict(0.9, 1.3) == "not known, too busy"


def test_samples_have_the_zeros_that_they_say() -> None:
    tensors = dict(replace(TINY, keep=(2, 4)).tensors())
    w_OI = tensors["model.layers.1.mlp.down_proj.weight"]
    assert ((w_OI != 0).reshape(-1, 4).sum(-1) == 2).all()
    assert np.count_nonzero(dict(TINY.tensors())["model.layers.1.mlp.down_proj.weight"]) == 64 * 128
    linears = [name for name in tensors if ".mlp." in name or ".self_attn." in name]
    assert sum(tensors[name].size for name in linears) == TINY.parameters
