"""Time and memory of a training step, beside plain dense fine-tuning and AST's choice of masks.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py
    python benchmarks/training_step.py --blocks 24 --hidden 2048 --ffn 8192 --heads 32 \
        --key-value-heads 8 --batch-tokens 16384 --device cuda

A Llama with random weights, by default with the shapes of SmolLM2-135M but fewer blocks. A step of:

- dense: what transformers and torch give: the model's own loss, clipping, fused AdamW;
- masked: the preset `default` without a teacher;
- cached: with the teacher's likeliest tokens read from files;
- resident: with the teacher in memory;
- released: as `resident`, with the optimiser of the preset `ast`.

They take turns and the fastest time of each counts. Masks are chosen by one comparison network over
all groups; beside it the loop that AST released: a sort that nothing uses, then the two largest of
every four columns, one group of columns after another. The share of a step is what one choice
takes, divided by the steps between two, over a step of `cached`. Memory is the peak during a step
of few tokens, so that activations do not count, per weight of the model.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.memory import LiveBytes
from harness.timing import timed
from secateur.blocks.precision import forward_precision
from secateur.models.structure import find_blocks
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.progress import silent
from secateur.training.distillation import Teacher
from secateur.training.holding import Holding
from secateur.training.options import Training
from secateur.training.start import masked_linears
from secateur.training.teacher import CachedTeacher, ResidentTeacher
from secateur.training.trainer import Trainer

MEMORY_TOKENS = 16


def make_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        num_hidden_layers=arguments.blocks,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(arguments.device)


class Dense:
    """Fine-tuning as anybody would write it."""

    def __init__(self, arguments: argparse.Namespace, windows_WL: Tensor) -> None:
        self._model = make_model(arguments)
        self._optimiser = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._windows_WL = windows_WL[: arguments.batch_tokens // arguments.length]
        self._batch = max(1, arguments.micro_batch_tokens // arguments.length)
        self._dtype = resolve_dtype(arguments.dtype, self._model.device)

    def step(self) -> None:
        batches = self._windows_WL.split(self._batch)
        for tokens in batches:
            ids = tokens.to(self._model.device).long()
            with forward_precision(self._dtype, self._model.device):
                loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * (len(tokens) / len(self._windows_WL))).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()


def make_trainer(
    arguments: argparse.Namespace,
    windows_WL: Tensor,
    preset: str,
    teacher: Callable[[Training], Teacher] | None,
) -> Trainer:
    # No step chooses masks, freezes them or ends the schedule.
    values = {
        "tokens": 1000 * arguments.batch_tokens,
        "length": arguments.length,
        "batch_tokens": arguments.batch_tokens,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "masks": {"refresh_steps": 1000},
        "dtype": arguments.dtype,
    }
    options = Training.from_mapping(values, preset)
    model = make_model(arguments)
    blocks = find_blocks(model)
    holding = Holding(blocks, masked_linears(blocks, {}, options))
    dtype = resolve_dtype(options.dtype, model.device)
    return Trainer(
        holding, None if teacher is None else teacher(options), windows_WL, options, dtype
    )


class Repeated:
    """A trainer that is given the same windows again and again."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def step(self) -> None:
        self.trainer.optimiser.steps = 0
        self.trainer.step()
        self.trainer.figures()


def contenders(arguments: argparse.Namespace, windows_WL: Tensor, folder: Path) -> dict[str, Any]:
    def resident(options: Training) -> Teacher:
        model = make_model(arguments)
        model.requires_grad_(False)
        dtype = resolve_dtype(options.dtype, model.device)
        holding = Holding(find_blocks(model.to(dtype)))
        return ResidentTeacher(holding, windows_WL, options.distillation.temperature)

    def cached(options: Training) -> Teacher:
        assert options.distillation.top_k is not None, "the preset asks the teacher once"
        return CachedTeacher.make(
            folder,
            make_model(arguments),
            windows_WL,
            temperature=options.distillation.temperature,
            count=options.distillation.top_k,
            batch=1,
            dtype=resolve_dtype(options.dtype, torch.device(arguments.device)),
            progress=silent,
        )

    return {
        "dense": Dense(arguments, windows_WL),
        "masked": Repeated(make_trainer(arguments, windows_WL, "default", None)),
        "cached": Repeated(make_trainer(arguments, windows_WL, "default", cached)),
        "resident": Repeated(make_trainer(arguments, windows_WL, "default", resident)),
        "released": Repeated(make_trainer(arguments, windows_WL, "ast", resident)),
    }


def released_refresh(weights: list[Tensor], masks: list[Tensor]) -> None:
    """The choice of masks as AST's code makes it, transcribed."""
    for index, weight in enumerate(weights):
        metric = weight.abs()
        torch.sort(metric, dim=1)
        mask = torch.zeros_like(weight, dtype=torch.int32)
        for column in range(0, weight.shape[1], 4):
            largest = metric[:, column : column + 4].topk(2, dim=1).indices
            mask.scatter_(1, column + largest, 1)
        (mask != masks[index]).sum().item()
        masks[index] = mask


def peak_bytes(make: Callable[[], Any], device: torch.device) -> int:
    """Most memory from the making of a contender to the end of its second step."""
    gc.collect()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    counter = LiveBytes()
    with nullcontext() if cuda else counter:
        contender = make()
        contender.step()
        gc.collect()
        counter.peak = counter.live
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        contender.step()
    return torch.cuda.max_memory_allocated() - before if cuda else counter.peak


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-value-heads", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--refreshes", type=int, default=5)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.device = str(resolve_device(arguments.device))
    return arguments


@dataclass(frozen=True)
class Times:
    """Seconds of steps and of choices of all masks, and what they are held against."""

    steps: dict[str, float]
    choices: dict[str, float]
    parameters: int
    weights: int


def measure(arguments: argparse.Namespace, windows_WL: Tensor, folder: Path) -> Times:
    device = torch.device(arguments.device)
    everyone = contenders(arguments, windows_WL, folder)
    steps = dict.fromkeys(everyone, float("inf"))
    for repeat in range(arguments.steps + 1):
        for name, contender in everyone.items():
            seconds = timed(contender.step, device)
            # The first step makes the optimiser's state.
            steps[name] = min(steps[name], seconds) if repeat else steps[name]
    paper, default = everyone["released"].trainer, everyone["cached"].trainer
    weights = [each.weight.data for each in paper.linears]
    masks = [each.mask.int() for each in paper.linears]
    refreshes: dict[str, Callable[[], object]] = {
        "released loop": partial(released_refresh, weights, masks),
        "magnitude": paper.refresh,
        "sensitivity, hysteresis": default.refresh,
    }
    choices = {
        name: min(timed(refresh, device) for _ in range(arguments.refreshes))
        for name, refresh in refreshes.items()
    }
    parameters = sum(p.numel() for p in default.parameters.values())
    return Times(steps, choices, parameters, sum(weight.numel() for weight in weights))


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_tokens // arguments.length, arguments.length)
    windows_WL = torch.randint(arguments.vocabulary, shape, generator=generator, dtype=torch.int32)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        times = measure(arguments, windows_WL, Path(folder))
    small = argparse.Namespace(
        **{**vars(arguments), "length": MEMORY_TOKENS, "batch_tokens": MEMORY_TOKENS}
    )
    few = windows_WL[:1, :MEMORY_TOKENS].contiguous()
    makers: dict[str, Callable[[], Any]] = {
        "dense": lambda: Dense(small, few),
        "masked": lambda: Repeated(make_trainer(small, few, "default", None)),
    }
    peaks = {name: peak_bytes(make, device) / times.parameters for name, make in makers.items()}

    print(
        f"{times.parameters / 1e6:.1f} M parameters, {times.weights / 1e6:.1f} M of them masked; "
        f"steps of {arguments.batch_tokens} tokens, {device.type}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| step | time | / dense | bytes per parameter |\n|---|---:|---:|---:|")
    for name, seconds in times.steps.items():
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        print(f"| {name} | {seconds:.3f} s | {seconds / times.steps['dense']:.3f} | {peak} |")
    print("\n| choice of masks | ns per weight | released / this | share of a step |")
    print("|---|---:|---:|---:|")
    interval = Training.from_mapping({"tokens": 10**9}).masks.refresh_steps
    for name, seconds in times.choices.items():
        share = seconds / interval / times.steps["cached"]
        speed = times.choices["released loop"] / seconds
        print(f"| {name} | {1e9 * seconds / times.weights:.2f} | {speed:.1f} | {share:.2%} |")


if __name__ == "__main__":
    main()
