"""Finished runs of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from report.benches import a_bench
from secateur.shrinking.curve import size_curve

Runs = dict[str, Path]


@pytest.fixture(scope="session")
def runs(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """Folders by name: two pruned models, a shrunk one, a recovered one, a curve and a trained
    model."""
    source, root = checkpoints("llama"), tmp_path_factory.mktemp("runs")
    text = {"source": str(text_file), "samples": 8, "length": 32}
    secateur.prune(
        source,
        secateur.Recipe.from_mapping(
            {"pattern": "0.5", "allocation": {"method": "ramp"}, "calibration": text}
        ),
        root / "ramp",
    )
    secateur.prune(
        source,
        secateur.Recipe.from_mapping({"pattern": "2:4", "calibration": text}),
        root / "semi",
    )
    small = {"sub_models": 24, "dtype": "float32", "calibration": text}
    secateur.shrink(
        source, root / "small", secateur.ShrinkOptions.from_mapping({**small, "sparsity": 0.3})
    )
    recovery = {
        "block_windows": 8, "tokens": 1024, "length": 32, "batch_tokens": 128, "rank": 2,
        "validation_windows": 4, "validations": 2,
    }  # fmt: skip
    secateur.recover(
        root / "small",
        root / "taught",
        secateur.Recovery.from_mapping(recovery),
        teacher=source,
        data=[str(text_file)],
        trust_remote_code=True,
    )
    size_curve(source, root / "sizes", secateur.ShrinkOptions.from_mapping(small))
    training = {
        "tokens": 1280, "length": 32, "batch_tokens": 128, "validation_windows": 4,
        "validations": 3, "masks": {"refresh_steps": 2},
    }  # fmt: skip
    secateur.train(
        source, secateur.Training.from_mapping(training), root / "trained", data=[str(text_file)]
    )
    measured = secateur.evaluate(
        root / "ramp", text=text_file, window=32, max_windows=8, against=source
    )
    (root / "ramp" / "secateur" / "evaluation.json").write_text(measured.model_dump_json())
    simulated = secateur.simulate(root / "ramp")
    (root / "ramp" / "secateur" / "simulation.json").write_text(
        json.dumps(simulated.model_dump(mode="json"))
    )
    secateur.continue_texts(root / "ramp", tokens=12)
    (root / "taught" / "secateur" / "bench.json").write_text(a_bench("taught").model_dump_json())
    return {path.name: path for path in sorted(root.iterdir())}
