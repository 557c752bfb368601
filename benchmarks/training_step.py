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

They take turns and the fastest time of each counts. Beside the choice of masks stands the loop that
AST released: a sort that nothing uses, then the two largest of every four columns, one group of
columns after another. The share of a step is what one choice takes, divided by the steps between
two, over a step of `cached`. Memory is the peak during a step of few tokens, so that activations do
not count, per weight of the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from costs import peak_bytes, timed
from secateur.blocks.precision import forward_precision
from secateur.models.text_path import find_blocks
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.progress import silent
from secateur.training.distillation import Teacher
from secateur.training.holding import Holding
from secateur.training.options import Training
from secateur.training.start import masked_linears
from secateur.training.teacher import CachedTeacher, ResidentTeacher
from secateur.training.trainer import Trainer

MEMORY_TOKENS = 16
SIZES = {"hidden": 576, "ffn": 1536, "heads": 9, "key_value_heads": 3, "blocks": 6}
TEXT = {"vocabulary": 49_152, "length": 512, "batch_tokens": 4096, "micro_batch_tokens": 4096}

Step = Callable[[], object]
MakeTeacher = Callable[[Training], Teacher]


class Bench:
    """Random models, and text for their steps."""

    def __init__(self, given: argparse.Namespace, folder: Path, tokens: int | None = None) -> None:
        self.given, self.folder = given, folder
        self.device = torch.device(given.device)
        self.dtype = resolve_dtype(given.dtype, self.device)
        self.length = tokens or given.length
        self.batch_tokens = tokens or given.batch_tokens
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_tokens // self.length, self.length)
        self.windows_WL = torch.randint(
            given.vocabulary, shape, generator=generator, dtype=torch.int32
        )

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=self.given.hidden,
            intermediate_size=self.given.ffn,
            num_attention_heads=self.given.heads,
            num_key_value_heads=self.given.key_value_heads,
            num_hidden_layers=self.given.blocks,
            vocab_size=self.given.vocabulary,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(self.device)

    def dense(self) -> Step:
        """Fine-tuning as anybody would write it."""
        model = self.model()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        batches = self.windows_WL.split(max(1, self.given.micro_batch_tokens // self.length))

        def step() -> None:
            for tokens in batches:
                ids = tokens.to(self.device).long()
                with forward_precision(self.dtype, self.device):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss * (len(tokens) / len(self.windows_WL))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

        return step

    def trainer(self, preset: str, teacher: MakeTeacher | None = None) -> Trainer:
        # No step chooses masks, freezes them or ends the schedule.
        values = {
            "tokens": 1000 * self.batch_tokens,
            "length": self.length,
            "batch_tokens": self.batch_tokens,
            "micro_batch_tokens": self.given.micro_batch_tokens,
            "masks": {"refresh_steps": 1000},
            "dtype": self.given.dtype,
        }
        options = Training.from_mapping(values, preset)
        blocks = find_blocks(self.model())
        holding = Holding(blocks, masked_linears(blocks, {}, options))
        made = None if teacher is None else teacher(options)
        return Trainer(holding, made, self.windows_WL, options, self.dtype)

    def resident(self, options: Training) -> Teacher:
        model = self.model()
        model.requires_grad_(False)
        holding = Holding(find_blocks(model.to(self.dtype)))
        return ResidentTeacher(holding, self.windows_WL, options.distillation.temperature)

    def cached(self, options: Training) -> Teacher:
        assert options.distillation.top_k is not None, "the preset asks the teacher once"
        return CachedTeacher.make(
            self.folder,
            self.model(),
            self.windows_WL,
            temperature=options.distillation.temperature,
            count=options.distillation.top_k,
            batch=1,
            dtype=self.dtype,
            progress=silent,
        )


def repeated(trainer: Trainer) -> Step:
    """A step on the same windows, again and again."""

    def step() -> None:
        trainer.optimiser.steps = 0
        trainer.step()
        trainer.figures()

    return step


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {**SIZES, **TEXT, "steps": 3, "refreshes": 5}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.device = str(resolve_device(given.device))

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(given, Path(folder))
        trainers = {
            "masked": bench.trainer("default"),
            "cached": bench.trainer("default", bench.cached),
            "resident": bench.trainer("default", bench.resident),
            "released": bench.trainer("ast", bench.resident),
        }
        steps: dict[str, Step] = {"dense": bench.dense()}
        steps |= {name: repeated(trainer) for name, trainer in trainers.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(given.steps + 1):
            for name, step in steps.items():
                times[name].append(timed(step, bench.device))
    # The first step makes the optimiser's state.
    fastest = {name: min(each[1:]) for name, each in times.items()}
    paper, default = trainers["released"], trainers["cached"]
    weights = [each.weight.data for each in paper.linears]
    masks = [each.mask.int() for each in paper.linears]
    choices: dict[str, Step] = {
        "released loop": partial(released_refresh, weights, masks),
        "magnitude": paper.refresh,
        "sensitivity, hysteresis": default.refresh,
    }
    chosen = {
        name: min(timed(choose, bench.device) for _ in range(given.refreshes))
        for name, choose in choices.items()
    }
    masked = sum(weight.numel() for weight in weights)
    parameters = sum(p.numel() for p in default.parameters.values())
    small = Bench(given, Path(), MEMORY_TOKENS)
    makers = {"dense": small.dense, "masked": lambda: repeated(small.trainer("default"))}
    peaks = {name: peak_bytes(make, bench.device) / parameters for name, make in makers.items()}

    print(
        f"{parameters / 1e6:.1f} M parameters, {masked / 1e6:.1f} M of them masked; steps of "
        f"{given.batch_tokens} tokens, {given.device}, {torch.get_num_threads()} threads\n\n"
        "| step | time | / dense | bytes per parameter |\n|---|---:|---:|---:|"
    )
    for name, seconds in fastest.items():
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        print(f"| {name} | {seconds:.3f} s | {seconds / fastest['dense']:.3f} | {peak} |")
    print("\n| choice of masks | ns per weight | released / this | share of a step |")
    print("|---|---:|---:|---:|")
    interval = Training.from_mapping({"tokens": 10**9}).masks.refresh_steps
    for name, seconds in chosen.items():
        speed, share = chosen["released loop"] / seconds, seconds / interval / fastest["cached"]
        print(f"| {name} | {1e9 * seconds / masked:.2f} | {speed:.1f} | {share:.2%} |")


if __name__ == "__main__":
    main()
