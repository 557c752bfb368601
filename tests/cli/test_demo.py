"""The demo, with a tiny model in place of the one that it fetches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import demo
from secateur.cli import app


def test_demo_ends_with_a_page(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "fetch_model", lambda progress: checkpoints("llama"))
    text = {"source": "self", "samples": 8, "length": 32}
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE | {"calibration": text})
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "WINDOWS", 4)
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--output", str(output)])
    assert done.exit_code == 0, done.output
    page = output / "secateur" / "report.html"
    assert str(page) in done.stdout.replace("\n", "")
    shown = page.read_text(encoding="utf-8")
    for title in ("Perplexity", "The same texts, dense and pruned", "Simulated accelerator"):
        assert title in shown
