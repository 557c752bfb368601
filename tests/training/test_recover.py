"""From a cut checkpoint to a recovered one: it learns, keeps its form, resumes, loads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from interruption import interrupted_after
from secateur.evaluation.scores import score_windows
from secateur.models.reader import CheckpointReader
from secateur.report.documents.training import RecoveryReport
from secateur.text.training import TrainingText
from secateur.training.recover import Chosen, recover
from secateur.training.recovery_options import Recovery

Pair = Callable[..., tuple[Path, Path]]


def options(**values: Any) -> Recovery:
    return Recovery.from_mapping(
        {
            "blocks": {"batch_sequences": 2},
            "block_windows": 16,
            "tokens": 16 * 128,
            "length": 32,
            "batch_tokens": 128,
            "rank": 4,
            "learning_rate": 5e-3,
            "validation_windows": 4,
            "validations": 4,
            "distillation": {"top_k": 16},
            "dtype": "float32",
            **values,
        }
    )


def run(
    models: tuple[Path, Path], text: Path, output: Path, chosen: Recovery, **others: Any
) -> RecoveryReport:
    cut, dense = models
    return recover(
        cut, output, chosen, teacher=dense, data=[str(text)], trust_remote_code=True, **others
    ).report


def loss_of(folder: Path, text: Path) -> float:
    """What a fresh reader of the files computes on the held-out windows."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    held_out = TrainingText.read(text / "secateur" / "training" / "text.safetensors").held_out_WL
    return float(score_windows(model, held_out.long()).loss_W.mean())


def weights_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize(
    ("family", "form", "network"),
    [
        ("llama", "uneven", "lora"),
        ("llama", "uneven", "full"),
        ("llama", "uniform", "lora"),
        ("qwen3", "padded", "none"),
        ("gpt2", "uneven", "lora"),
    ],
)
def test_recovered_model_is_nearer_and_the_evaluated_one(
    family: str, form: str, network: str, cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models, output = cut_models(family, form), tmp_path / "out"
    before = weights_in(models[0])
    report = run(models, text_file, output, options(network=network))
    assert weights_in(models[0]) == before
    held_out = report.validation
    assert held_out.after < held_out.before or network == "none"
    assert held_out.before == pytest.approx(loss_of(models[0], output), rel=1e-5)
    assert held_out.dense == pytest.approx(loss_of(models[1], output), rel=1e-5)
    assert held_out.after == pytest.approx(loss_of(output, output), rel=1e-5)
    assert len(report.blocks) == 3
    ours, theirs = CheckpointReader(output), CheckpointReader(models[0])
    assert ours.dtypes == theirs.dtypes
    assert ours.shapes == theirs.shapes
    assert report.model_dump(mode="json") == json.loads((output / "report.json").read_text())
    left = {path.name for path in (output / "secateur").rglob("*") if path.is_file()}
    log = {"log.jsonl"} if network != "none" else set()
    kept = {"manifest.json", "kept.safetensors", "text.safetensors", "report.html"}
    assert left == kept | log


@pytest.mark.parametrize(
    ("family", "network"), [("llama", "lora"), ("llama", "full"), ("opt", "lora"), ("gpt2", "lora")]
)
def test_what_is_gone_of_a_padded_model_stays_zero(
    family: str, network: str, cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models = cut_models(family, "padded")
    report = run(models, text_file, tmp_path / "out", options(network=network))
    assert report.network is not None
    assert report.network.chosen_step > 0
    cut, recovered = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (models[0], tmp_path / "out")
    )
    lines = 0
    for name, weight in cut.items():
        if weight.ndim == 2 and "embed" not in name:
            for axis in (0, 1):
                gone = (weight == 0).all(axis)
                lines += int(gone.sum())
                assert not recovered[name].movedim(axis, 0)[:, gone].any()
    assert lines > 0


def test_blocks_come_nearer_to_the_dense_hidden_states(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    report = run(cut_models("llama"), text_file, tmp_path / "out", options(network="none"))
    assert report.network is None
    for block in report.blocks:
        assert block.after <= block.before
    assert sum(each.after for each in report.blocks) < sum(each.before for each in report.blocks)


def test_fitted_blocks_that_held_out_text_dislikes_are_left_out(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models, output = cut_models("llama", "uniform"), tmp_path / "out"
    report = run(models, text_file, output, options(network="none"))
    held_out = report.validation
    assert held_out.after_blocks is not None
    # The tiny model is random: to come nearer to it does not help to foresee a text.
    assert held_out.before < held_out.after_blocks
    assert held_out.after == held_out.before
    assert "left out" in report.notes[0]
    cut, kept = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (models[0], output)
    )
    assert all(torch.equal(cut[name], kept[name]) for name in cut)


def test_a_block_of_which_nothing_is_left_is_passed(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    cut, dense = cut_models("llama", sparsity=0.9)
    sizes = json.loads((cut / "config.json").read_text())["per_layer_config"].values()
    assert any(each["intermediate_size"] == each["num_attention_heads"] == 0 for each in sizes)
    report = run((cut, dense), text_file, tmp_path / "out", options())
    assert report.validation.after < report.validation.before


def test_held_out_text_chooses_the_checkpoint(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # A rate that ruins the model but leaves its gradients finite on every processor: what it was at
    # the beginning is the best there is.
    report = run(cut_models("llama"), text_file, output, options(network="full", learning_rate=2.0))
    assert report.network is not None
    assert report.network.chosen_step == 0
    start = report.network.validations[0]["validation_loss"]
    assert report.validation.after == pytest.approx(start, rel=1e-6)
    losses = [each["validation_loss"] for each in report.network.validations]
    assert min(losses) == losses[0] < losses[-1]


@pytest.mark.parametrize("blocks", [1, 3])
def test_interrupted_while_blocks_are_fitted(
    blocks: int, cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models = cut_models("llama")
    run(models, text_file, tmp_path / "whole", options())
    with interrupted_after(blocks):
        run(models, text_file, tmp_path / "stopped", options())
    assert not (tmp_path / "stopped" / "model.safetensors.index.json").exists()
    report = run(models, text_file, tmp_path / "stopped", options())
    assert report.resumed_blocks == blocks - 1
    assert weights_in(tmp_path / "stopped") == weights_in(tmp_path / "whole")
    assert [part["cache"] for part in report.text["parts"]] == ["taken"]
    again = run(models, text_file, tmp_path / "stopped", options())
    assert again == report


# Runs the real program and kills it, by the signal nothing can catch, after some steps.
_KILLED = """
import os, signal, sys
from secateur.training.recovery_options import Recovery
from secateur.training.recover import recover
from secateur.training import trainer
cut, dense, text, output, options, steps = sys.argv[1:]
real = trainer.Trainer.step
def step(self):
    real(self)
    if self.done == int(steps):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer.step = step
chosen = Recovery.model_validate_json(options)
recover(cut, output, chosen, teacher=dense, data=[text], trust_remote_code=True)
"""


@pytest.mark.parametrize("network", ["lora", "full"])
def test_killed_while_the_network_is_trained(
    network: str, cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models = cut_models("llama")
    chosen = options(network=network, checkpoint_minutes=0.0)
    whole = run(models, text_file, tmp_path / "whole", chosen)
    arguments = [*map(str, models), str(text_file), str(tmp_path / "killed")]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments, chosen.model_dump_json(), "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    report = run(models, text_file, tmp_path / "killed", chosen)
    assert report.network is not None
    assert whole.network is not None
    assert report.network.resumed_steps == 6
    assert report.network.validations == whole.network.validations
    assert weights_in(tmp_path / "killed") == weights_in(tmp_path / "whole")


def test_kept_units_stay_beside_the_checkpoint(
    cut_models: Pair, text_file: Path, tmp_path: Path
) -> None:
    models = cut_models("llama")
    run(models, text_file, tmp_path / "out", options(network="none"))
    before, after = (
        load_file(folder / "secateur" / "kept.safetensors")
        for folder in (models[0], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_public_names() -> None:
    assert secateur.recover is recover
    assert secateur.Recovery is Recovery


def test_the_lowest_loss_is_kept_the_earliest_of_equal_ones(tmp_path: Path) -> None:
    path, weight = tmp_path / "chosen.safetensors", nn.Parameter(torch.zeros(2))
    chosen = Chosen(path, {"w": weight})
    for value, loss in ((1.0, 3.0), (2.0, 2.0), (3.0, 2.5)):
        weight.data.fill_(value)
        chosen.offer(loss)
    again = Chosen(path, {"w": weight})
    for value, loss in ((4.0, 2.0), (5.0, float("nan"))):
        weight.data.fill_(value)
        again.offer(loss)
    assert again.take() == 2.0
    assert weight.tolist() == [2.0, 2.0]
