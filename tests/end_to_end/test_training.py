"""From a checkpoint to a trained one: it learns, its zeros are exact, it resumes, it loads."""

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
from transformers import AutoModelForCausalLM

import secateur
from interruption import interrupted_after
from secateur.evaluation.scores import score_windows
from secateur.models.masks import read_masks
from secateur.models.reader import CheckpointReader
from secateur.report.documents.training import TrainingReport
from secateur.runs.errors import SecateurError
from secateur.text.training import TrainingText
from secateur.training.options import Training
from secateur.training.train import train

_LENGTH = 32


def options(preset: str = "ast", **values: Any) -> Training:
    return Training.from_mapping(
        {
            "tokens": 12 * 128,
            "length": _LENGTH,
            "batch_tokens": 128,
            "validation_windows": 4,
            "validations": 2,
            "optimiser": {"learning_rate": 5e-3},
            "masks": {"refresh_steps": 2, **values.pop("masks", {})},
            "dtype": "float32",
            **values,
        },
        preset,
    )


def run(source: Path, text: Path, output: Path, chosen: Training, **others: Any) -> TrainingReport:
    return train(source, chosen, output, data=[str(text)], **others).report


def loss_of(folder: Path) -> float:
    """What a fresh reader of the files computes on the held-out windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = TrainingText.read(folder / "secateur" / "training" / "text.safetensors")
    return float(score_windows(model, text.held_out_WL.long()).loss_W.mean())


def weights_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "secateur" / "training" / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("qwen2", torch.float32), ("gpt2", torch.float32)],
)
def test_trained_checkpoint_is_the_evaluated_one_with_exact_zeros(
    family: str,
    dtype: torch.dtype,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source, output = checkpoints(family, dtype), tmp_path / "out"
    before = weights_in(source)
    report = run(source, text_file, output, options())
    assert weights_in(source) == before
    assert report.validation.after < report.validation.before - 0.5
    assert report.validation.after == pytest.approx(loss_of(output), rel=1e-5)
    assert report.sparsity.zeros == report.sparsity.weights // 2
    assert "2:4" in secateur.inspect(output).patterns
    ours, theirs = CheckpointReader(output), CheckpointReader(source)
    assert ours.dtypes == theirs.dtypes
    assert ours.shapes == theirs.shapes
    assert report.model_dump(mode="json") == json.loads((output / "report.json").read_text())


def test_masks_beside_the_checkpoint_are_those_of_its_zeros(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    run(checkpoints("llama"), text_file, tmp_path / "out", options(pattern="0.6"))
    for index, block in enumerate(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    ):
        linears = {name: m.weight for name, m in block.named_modules() if hasattr(m, "in_features")}
        masks = read_masks(
            tmp_path / "out" / "secateur" / "masks" / f"block-{index:03d}.safetensors",
            {name: weight.shape[1] for name, weight in linears.items()},
        )
        for name, weight in linears.items():
            assert torch.equal(weight != 0, masks[name])


# Runs the real program and kills it, by the signal nothing can catch, after some steps.
_KILLED = """
import os, signal, sys, yaml
from pathlib import Path
from secateur.training import trainer
from secateur.training.options import Training
from secateur.training.train import train
source, text, output, options, steps = sys.argv[1:]
real = trainer.Trainer.step
def step(self):
    real(self)
    if self.done == int(steps):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer.step = step
chosen = Training.model_validate(yaml.safe_load(options))
train(source, chosen, output, data=[text])
"""

_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"low_rank": {"group": 8}},
    "as CAST has it": {
        "decay": {"place": "outside", "norm": "l1", "strength": 1.0},
        "masks": {"forward": "dense", "rescale": True, "frozen_share": 0.5},
    },
    "cached teacher, frozen": {
        "distillation": {"top_k": 8},
        "decay": {"place": "outside"},
        "masks": {"score": "sensitivity", "hysteresis": 0.05, "frozen_share": 0.5},
    },
    "one threshold": {
        "pattern": "0.6",
        "decay": {"strength": 0.0, "place": "outside"},
        "masks": {"scope": "global", "score": "sensitivity", "frozen_share": 0.5},
    },
}


@pytest.mark.parametrize(
    ("variant", "killed_at"),
    [
        ("paper", 5),
        ("as CAST has it", 9),
        ("cached teacher, frozen", 5),
        ("cached teacher, frozen", 9),
        # The last state before the freeze, and one behind it.
        ("one threshold", 7),
        ("one threshold", 9),
    ],
)
def test_killed_run_resumes_to_the_same_bytes(
    variant: str,
    killed_at: int,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = checkpoints("llama")
    chosen = options(**_VARIANTS[variant], checkpoint_minutes=0.0)
    run(source, text_file, tmp_path / "whole", chosen)
    arguments = [source, text_file, tmp_path / "out", chosen.model_dump_json(), killed_at]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, arguments)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    report = run(source, text_file, tmp_path / "out", chosen)
    assert report.resumed_steps == killed_at - 1
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "whole")
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")
    again = run(source, text_file, tmp_path / "out", chosen)
    assert again == report


def test_pruned_checkpoint_keeps_every_zero(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    dense, pruned = checkpoints("llama"), tmp_path / "pruned"
    recipe = secateur.Recipe.from_mapping({"pattern": "0.5", "stages": [{"method": "magnitude"}]})
    calibration = {"source": str(text_file), "samples": 8, "length": 32}
    values = {**recipe.model_dump(mode="json"), "calibration": calibration}
    secateur.prune(dense, secateur.Recipe.from_mapping(values), pruned)
    masks = pruned / "secateur" / "masks" / "block-001.safetensors"
    sparse = {"train": "lora", "lora_rank": 4}
    for output, source, values in [
        (tmp_path / "a", pruned, {}),
        (tmp_path / "b", tmp_path / "a", {}),
        (tmp_path / "lora", pruned, sparse),
    ]:
        report = run(source, text_file, output, options("keep-mask", **values), teacher=dense)
        assert report.validation.after == pytest.approx(loss_of(output), rel=1e-5)
        kept = output / "secateur" / "masks" / "block-001.safetensors"
        assert kept.read_bytes() == masks.read_bytes()
        assert report.validation.after < report.validation.before
        assert secateur.inspect(output).zeros == secateur.inspect(pruned).zeros
    with pytest.raises(SecateurError, match="name the dense model with --teacher"):
        run(pruned, text_file, tmp_path / "c", options("keep-mask"))
    with pytest.raises(SecateurError, match=r"does not fit: .*pattern 2:4"):
        run(pruned, text_file, tmp_path / "c", options(), teacher=dense)


def test_low_rank_products_are_saved_beside_and_counted(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(checkpoints("llama"), text_file, output, options(low_rank={"group": 8}))
    tensors = load_file(output / "low-rank" / "adapter_model.safetensors")
    assert report.low_rank is not None
    assert report.low_rank.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert "2:4" in secateur.inspect(output).patterns
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for name, a_RI in tensors.items():
        if name.endswith("lora_A.weight"):
            owner = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_OR = tensors[name.replace("lora_A", "lora_B")]
            model.get_submodule(owner).weight.data += b_OR @ a_RI
    model.save_pretrained(tmp_path / "merged")
    held_out = TrainingText.read(output / "secateur" / "training" / "text.safetensors").held_out_WL
    loss = float(score_windows(model.eval(), held_out.long()).loss_W.mean())
    assert report.validation.after == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_products_that_fit_the_text_begin_better(
    family: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    first = {
        start: run(
            checkpoints(family),
            text_file,
            tmp_path / start,
            options(low_rank={"group": 8, "start": start}),
        ).curve[0]
        for start in ("means", "covariance")
    }
    assert first["covariance"]["step"] == first["means"]["step"] == 1
    assert first["covariance"]["divergence"] < 0.95 * first["means"]["divergence"]
    values = {"low_rank": {"group": 8, "start": "covariance"}, "distillation": {"weight": 0.0}}
    with pytest.raises(SecateurError, match="is pruned, and a low-rank start"):
        run(tmp_path / "means", text_file, tmp_path / "c", options(**values))


def test_one_threshold_moves_zeros_between_linears(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(checkpoints("llama"), text_file, output, options(**_VARIANTS["one threshold"]))
    assert report.sparsity.zeros == round(0.6 * report.sparsity.weights)
    assert report.validation.after == pytest.approx(loss_of(output), rel=1e-5)
    assert report.validation.after < report.validation.before
    each = {linear.zeros / linear.weights for linear in secateur.inspect(output).linears}
    assert len(each) > 1


def test_bad_input_leaves_nothing_behind(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for family, values, others, message in [
        ("llama", {"tokens": 10**6}, {}, "Training needs .* the text has"),
        ("llama", {"pattern": "2:5"}, {}, r"layers\.0\..*divisible by 5"),
        ("llama", {"low_rank": {"group": 5}}, {}, r"layers\.0\..*divisible by 5"),
        ("llama", {"length": 128}, {}, "longer than the model's 64 positions"),
        ("mixtral", {}, {}, "mixtral|experts|cannot be trained"),
        ("llama", {}, {"teacher": _other_vocabulary(tmp_path, checkpoints)}, "another vocabulary"),
        ("llama", {"masks": {"frozen_share": 1.0}}, {"teacher": checkpoints("llama")}, "no zeros"),
    ]:
        with pytest.raises(SecateurError, match=message):
            run(checkpoints(family), text_file, output, options(**values), **others)
        if "no zeros" not in message:
            assert not output.exists()


def _other_vocabulary(folder: Path, checkpoints: Callable[..., Path]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    model.resize_token_embeddings(300)
    model.save_pretrained(folder / "other")
    for path in checkpoints("llama").glob("tokenizer*"):
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    return folder / "other"


def test_loss_that_is_not_finite_keeps_the_last_state(
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    wild = options(optimiser={"learning_rate": 1e3}, checkpoint_minutes=0.0)
    with pytest.raises(SecateurError, match="NaN or infinite at step"):
        run(checkpoints("llama"), text_file, tmp_path / "out", wild)
    for state in (tmp_path / "out" / "secateur" / "training").glob("state-*/*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(state).values())
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_default_preset_starts_from_a_one_shot_mask(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    chosen = options("default", distillation={"top_k": 16})
    output = tmp_path / "out"
    # An interruption while it is pruning; the first block is not pruned again.
    with interrupted_after(1):
        run(checkpoints("llama"), text_file, output, chosen)
    report = run(checkpoints("llama"), text_file, output, chosen)
    assert report.start is not None
    assert report.start.resumed_blocks == 1
    assert report.start.recipe["pattern"] == "2:4"
    assert report.validation.after < report.validation.before
    assert report.sparsity.zeros == report.sparsity.weights // 2
    assert "2:4" in secateur.inspect(output).patterns
    assert not (output / "secateur" / "training" / "start").exists()

    largest = run(checkpoints("llama"), text_file, tmp_path / "b", options(start="magnitude"))
    assert largest.start is None
    assert report.validation.before < largest.validation.before
    again = run(output, text_file, tmp_path / "c", chosen, teacher=checkpoints("llama"))
    assert again.start is None
    assert again.validation.before == pytest.approx(report.validation.after, abs=0.05)
