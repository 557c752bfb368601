"""Several processes hold a part of the model each, and train it as one would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from secateur.models.structure import Linear, find_linears
from secateur.models.text_path import find_blocks
from secateur.patterns.pattern import NM, Unstructured
from secateur.report.documents.training import TrainingReport
from secateur.runs.errors import SecateurError
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import RowBudget, choose_mask
from secateur.training.options import Training
from secateur.training.ranks import Ranks
from secateur.training.start import check_shardable
from torchrun import check_parts, run, together

_LENGTH, _STEPS, _RATE = 32, 6, 3e-3


def options(preset: str = "ast", **values: Any) -> Training:
    return Training.from_mapping(
        {
            "tokens": _STEPS * 4 * _LENGTH,
            "length": _LENGTH,
            "batch_tokens": 4 * _LENGTH,
            "micro_batch_tokens": _LENGTH,
            "validation_windows": 3,
            "validations": 2,
            "optimiser": {"learning_rate": _RATE},
            "masks": {"refresh_steps": 2, **values.pop("masks", {})},
            "decay": {"ramp_share": 0, **values.pop("decay", {})},
            "dtype": "float32",
            "device": "cpu",
            **values,
        },
        preset,
    )


def assert_same_result(first: Path, second: Path) -> None:
    """Checkpoint, masks and adapter agree up to the rounding of sums, zeros exactly."""
    paths = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert paths == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    for path in paths:
        ours, theirs = load_file(first / path), load_file(second / path)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            if name.endswith("attn.bias"):
                # Biases of keys change no output: their gradients are rounding, scaled up by Adam.
                torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=_RATE)
            elif tensor.is_floating_point():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(tensor, theirs[name])


def norms(output: Path) -> list[float]:
    """Lengths of the gradients that the report shows."""
    report = TrainingReport.model_validate_json((output / "report.json").read_text())
    return [entry["gradient_norm"] for entry in report.curve]


_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"low_rank": {"group": 8}},
    "unstructured, frozen": {
        "pattern": "0.6",
        "masks": {"score": "sensitivity", "hysteresis": 0.05, "frozen_share": 0.5},
        "decay": {"place": "outside"},
        "distillation": {"top_k": 8},
        "activation_checkpointing": True,
    },
    "one-shot start": {"preset": "default", "distillation": {"top_k": 8}},
    "every pass": {"reduce_every_pass": True},
    # Weights that differ in their last bit of fp32 round differently to bf16 sooner or later, and
    # Adam makes steps of gradients that are all rounding. Two passes a step, one in each process,
    # give the same bits in either order, unless clipped by a norm that is summed over processes;
    # many passes are therefore held to the first step.
    "bfloat16": {
        "dtype": "bfloat16",
        "tokens": _STEPS * 2 * _LENGTH,
        "batch_tokens": 2 * _LENGTH,
        "optimiser": {"learning_rate": _RATE, "clip": 1e3},
    },
    "bfloat16, one step": {"dtype": "bfloat16", "tokens": 4 * _LENGTH, "validations": 1},
    "dense, then frozen": {
        "masks": {"forward": "dense", "rescale": True, "frozen_share": 0.5},
        "decay": {"place": "outside", "norm": "l1"},
    },
    "one threshold": {
        "pattern": "0.6",
        "masks": {"scope": "global", "score": "sensitivity", "frozen_share": 0.25},
        "decay": {"strength": 0.0, "place": "outside"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "world", "variant"),
    [
        ("llama", 2, "paper"),
        ("llama", 4, "unstructured, frozen"),
        ("gpt2", 2, "every pass"),
        ("gemma2", 4, "paper"),
        ("llama", 2, "bfloat16"),
        ("qwen2", 2, "bfloat16, one step"),
        ("llama", 2, "dense, then frozen"),
        ("llama", 2, "one-shot start"),
        ("gpt2", 2, "one threshold"),
    ],
)
def test_several_processes_give_the_result_of_one(
    family: str,
    world: int,
    variant: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source, chosen = checkpoints(family), options(**_VARIANTS[variant])
    run(source, text_file, tmp_path / "one", chosen)
    ended = together(world, run, source, text_file, tmp_path / "several", chosen)
    assert ended == [0] * world
    assert_same_result(tmp_path / "one", tmp_path / "several")
    one, several = (
        TrainingReport.model_validate_json((tmp_path / name / "report.json").read_text())
        for name in ("one", "several")
    )
    assert several.sparsity == one.sparsity
    assert several.validation.before == pytest.approx(one.validation.before, rel=1e-5)
    assert several.validation.after == pytest.approx(one.validation.after, rel=1e-4)
    flips = [[entry.get("flip_rate") for entry in each.curve] for each in (one, several)]
    assert flips[0] == pytest.approx(flips[1])
    assert norms(tmp_path / "one") == pytest.approx(norms(tmp_path / "several"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "variant"),
    [(2, 1, "paper"), (1, 2, "paper"), (2, 4, "paper"), (2, 1, "one threshold")],
)
def test_killed_run_resumes_with_another_number_of_processes(
    before: int,
    after: int,
    variant: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = checkpoints("llama")
    chosen = options(**_VARIANTS[variant], checkpoint_minutes=0.0)
    run(source, text_file, tmp_path / "whole", chosen)
    output = tmp_path / "out"
    ended = together(before, run, source, text_file, output, chosen, 5)
    assert 0 not in ended
    assert [path.name for path in (output / "secateur" / "training").glob("state*")] == [
        "state-00000004"
    ]
    assert together(after, run, source, text_file, output, chosen) == [0] * after
    assert_same_result(tmp_path / "whole", output)
    assert not list((output / "secateur" / "training").glob("state*"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "after"), [("llama", 4), ("gpt2", 1)])
def test_masked_adapters_of_several_processes_are_those_of_one(
    family: str, after: int, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    torch.manual_seed(0)
    for block in find_blocks(model):
        for linear in find_linears(block):
            linear.weight_OI.mul_(torch.rand_like(linear.weight_OI) < 0.5)
    source, output = tmp_path / "sparse", tmp_path / "out"
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(checkpoints(family)).save_pretrained(source)
    chosen = options(
        "keep-mask",
        train="lora",
        lora_rank=3,
        distillation={"weight": 0.0},
        checkpoint_minutes=0.0,
    )
    run(source, text_file, tmp_path / "one", chosen)
    assert 0 not in together(2, run, source, text_file, output, chosen, 5)
    assert together(after, run, source, text_file, output, chosen) == [0] * after
    assert_same_result(tmp_path / "one", output)
    assert norms(tmp_path / "one") == pytest.approx(norms(output), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_process_holds_its_share_alone(
    family: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    arguments = (checkpoints(family), text_file, tmp_path / "out", options())
    assert together(4, check_parts, *arguments) == [0] * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low_rank": {"group": 8, "start": "covariance"}}, "low_rank.start: covariance works in"),
        ({}, "The 5 outputs of proj cannot be divided evenly among 2 processes"),
    ],
)
def test_what_needs_one_process_is_refused(values: dict[str, Any], message: str) -> None:
    linears = {"proj": Linear("proj", Conv1D(5, 8), transposed=True)}
    check_shardable(options(**values), linears, Ranks(0, 1))
    with pytest.raises(SecateurError, match=message):
        check_shardable(options(**values), linears, Ranks(0, 2))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)])
@pytest.mark.parametrize("rows", [6, 7])
def test_parts_choose_the_masks_of_the_whole(pattern: NM | Unstructured, rows: int) -> None:
    torch.manual_seed(0)
    linear = Linear("proj", torch.nn.Linear(8, rows), transposed=False)
    zeros = round(pattern.sparsity * rows * 8)
    budget = RowBudget.even(pattern, rows, zeros)
    mask_OI = choose_mask(linear.weight_OI.abs(), budget)
    whole = MaskedLinear("proj", linear, budget, mask_OI)
    parts = []
    for rank in range(4):
        mine = Ranks(rank, 4).rows(rows)
        part = whole.part(torch.nn.Parameter(linear.weight_OI[mine].clone()), mine)
        assert torch.equal(part.mask, mask_OI[mine])
        parts.append(choose_mask(part.weight.detach().abs(), part.rows))
    assert torch.equal(torch.cat(parts), mask_OI)
