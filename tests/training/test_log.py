"""Curves in TensorBoard: the numbers of the log, after an interruption too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secateur.runs.errors import SecateurError
from secateur.training import log
from secateur.training.log import Log, follower
from secateur.training.options import Training
from secateur.training.train import train

Points = dict[str, list[tuple[int, float]]]


def points_shown(work: Path) -> Points:
    """Steps and values of every curve."""
    events = EventAccumulator(str(work / "tensorboard"))
    events.Reload()
    return {
        key: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def points_logged(work: Path) -> Points:
    points: Points = {}
    for line in (work / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for key in entry.keys() - {"step"}:
            points.setdefault(key, []).append((entry["step"], entry[key]))
    return points


def test_a_resumed_run_has_the_curves_of_its_log(tmp_path: Path) -> None:
    for first, last in ((0, 6), (4, 8), (8, 8)):
        with follower("tensorboard" if first else None, tmp_path) as follow:
            lines = Log(tmp_path / "log.jsonl", first, follow)
            for step in range(first + 1, last + 1):
                # What is done again may come out otherwise.
                lines.add({"step": step, "loss": first + 1 / step, "flips": None})
                if step % 3 == 0:
                    lines.add({"step": step, "held_out": 2.0 * step})
    assert points_logged(tmp_path)["held_out"] == [(3, 6.0), (6, 12.0)]
    assert points_shown(tmp_path) == points_logged(tmp_path)


def test_training_writes_the_curves_of_its_log(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(output: Path, log_to: str | None) -> object:
        options = Training.from_mapping(
            {
                "tokens": 4 * 128,
                "length": 32,
                "batch_tokens": 128,
                "validation_windows": 2,
                "validations": 2,
                "distillation": {"weight": 0.0},
                "masks": {"refresh_steps": 2},
                "log_to": log_to,
            },
            "ast",
        )
        return train(checkpoints("llama"), options, output, data=[str(text_file)]).report

    output = tmp_path / "out"
    report = run(output, "tensorboard")
    work = output / "secateur" / "training"
    logged = points_logged(work)
    assert [step for step, _ in logged["cross_entropy"]] == [1, 2, 3, 4]
    assert [step for step, _ in logged["flip_rate"]] == [2]
    assert [step for step, _ in logged["validation_loss"]] == [0, 2, 4]
    assert points_shown(work) == logged
    # Where figures go does not make it another run.
    assert run(output, None) == report
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    with pytest.raises(SecateurError, match=r"install secateur\[tensorboard\]"):
        run(tmp_path / "other", "tensorboard")
    assert not (tmp_path / "other").exists()
