"""Comparisons of a tiny model, whose processes run within this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from secateur.cli import app
from secateur.runs.processes import Measured
from secateur.runs.processes import measure as measure_process

PIQA = {"goal": "dry", "sol1": "use a towel", "sol2": "wet it", "label": 0}


@pytest.fixture
def edit(checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a comparison file."""
    (tmp_path / "piqa_valid.jsonl").write_text((json.dumps(PIQA) + "\n") * 3)

    def edit(rows: dict[str, Any] | None = None, *, top: Any = None, **evaluation: Any) -> Path:
        values = {
            "model": str(checkpoints("llama")),
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            "evaluation": {"text": str(text_file), "window": 32, "max_windows": 8, **evaluation},
            "dtype": "float32",
            **(top or {}),
            "rows": rows
            or {
                "magnitude": {"stages": [{"method": "magnitude"}]},
                "wanda 2:4": {"stages": [{"method": "wanda"}], "pattern": "2:4"},
            },
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return edit


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that ran, within this process because starting others takes seconds."""
    commands: list[str] = []

    def run(command: Sequence[str], log: Path) -> str:
        result = CliRunner().invoke(app, list(command[3:]))
        commands.append(f"{command[3]} {Path(command[4]).parent.name}")
        if result.exit_code == 130:
            raise KeyboardInterrupt
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def measure(command: Sequence[str], log: Path) -> Measured:
        if command[1] == "-m":
            run(command, log)
        else:
            measure_process(command, log)
            commands.append("")
        name = command[3] if command[1] == "-m" else "script"
        output = command[command.index("--output") + 1]
        commands[-1] = f"{name} {Path(output).parent.name}"
        return Measured(seconds=61.0, cpu_seconds=60.0, peak_bytes=2 * 10**9)

    monkeypatch.setattr("secateur.comparison.run.measure", measure)
    monkeypatch.setattr("secateur.comparison.run.output_of", run)
    monkeypatch.setattr("secateur.comparison.run.apart", lambda call, *args: call(*args))
    return commands
