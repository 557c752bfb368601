"""Time of rebuilding the masks of one block, beside LLM-Barber's procedure as it was released.

    OMP_NUM_THREADS=1 python benchmarks/barber_step.py
    python benchmarks/barber_step.py --hidden 4096 --ffn 11008 --heads 32 --device cuda

One decoder block with random weights, by default with the shapes of SmolLM2-135M, pruned by
magnitude. Contenders:

- transcribed: LLM-Barber's steps one by one: fp32, one sequence at a time, four forwards of the
  block, two thresholds for each row in a loop over rows;
- barber, swaps: the stages, with their acceptance on held-out sequences;
- sparsegpt: statistics and one pass of SparseGPT over the dense block.

Times of the stages are those that the report of a run has. All see as many fitted sequences; the
fastest run of each counts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from costs import timed
from random_llama import SMOLLM2, random_block, write_checkpoint
from secateur import Recipe, prune
from secateur.patterns.pattern import Budget, parse_pattern, select
from secateur.runs.device import resolve_device

BATCH = 4
RATIO = 0.01
# The stages of a run, and those of its times that count.
RUNS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "barber": (
        [{"method": "magnitude"}, {"method": "barber", "ratio": RATIO, "batch_sequences": BATCH}],
        ("barber",),
    ),
    "swaps": ([{"method": "magnitude"}, {"method": "swaps", "batch_sequences": BATCH}], ("swaps",)),
    "sparsegpt": ([{"method": "sparsegpt", "refit_iterations": 0}], ("statistics", "solve")),
}


class Caught(Exception):
    """The inputs of a part of a block are known."""


class Transcribed:
    """The released procedure on a block of its own."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        fitted = given.sequences * 3 // 4
        self.block, self.x_SLD, self.rotary = random_block(given, fitted, device)
        self.dense = {
            name: module.weight.clone()
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear)
        }

    def reset(self) -> None:
        for name, dense_OI in self.dense.items():
            budget = Budget(parse_pattern("0.5"), (len(dense_OI),), (dense_OI.numel() // 2,))
            mask_OI = select(dense_OI.abs(), budget, "row")
            self.block.get_submodule(name).weight.copy_(dense_OI * mask_OI)

    def run(self) -> None:
        """Both parts of the block: score, rebuild, and a pass over the result."""
        for part in (self.block.self_attn, self.block.mlp):
            weights = {
                name: self.dense[name]
                for name, module in self.block.named_modules()
                if any(module is each for each in part.modules()) and name in self.dense
            }
            squares = {name: torch.zeros_like(dense_OI) for name, dense_OI in weights.items()}
            for x_LD in self.x_SLD:
                for name, gradient_OI in self.gradients(part, weights, x_LD).items():
                    squares[name] += gradient_OI.square() / len(self.x_SLD)
            for name, dense_OI in weights.items():
                weight_OI = self.block.get_submodule(name).weight
                score_OI = dense_OI.abs() * squares[name].sqrt()
                removed_OI = weight_OI == 0
                for row in range(len(score_OI)):
                    rebuild_row(score_OI[row], removed_OI[row])
                weight_OI.copy_(dense_OI * ~removed_OI)
            for x_LD in self.x_SLD:
                self.forward(x_LD)

    @torch.no_grad()
    def forward(self, x_LD: Tensor) -> None:
        self.block(x_LD[None], position_embeddings=self.rotary)

    def gradients(
        self, part: nn.Module, weights: dict[str, Tensor], x_LD: Tensor
    ) -> dict[str, Tensor]:
        """Gradient of one sequence's error at the dense weights of a part."""
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal inputs
            inputs = args, kwargs
            raise Caught

        hook = part.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.forward(x_LD)
        except Caught:
            hook.remove()
        with torch.no_grad():
            target = output_of(part(*inputs[0], **inputs[1]))
        # The released code runs the block to its end in this pass.
        self.forward(x_LD)
        leaves = {name: dense_OI.clone().requires_grad_() for name, dense_OI in weights.items()}
        inside = {f"{name.rpartition('.')[2]}.weight": leaf for name, leaf in leaves.items()}
        with torch.enable_grad():
            output = output_of(functional_call(part, inside, *inputs))
            loss = nn.functional.mse_loss(output, target)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def output_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def rebuild_row(score_I: Tensor, removed_I: Tensor) -> None:
    """Exchange the first pairs of a row by two thresholds, in the mask of removed weights."""
    grow = score_I[removed_I].sort(descending=True).values
    prune = score_I[~removed_I].sort().values
    size = min(len(grow), len(prune))
    if size == 0:
        return
    count = int(int((grow[:size] > prune[:size]).sum()) * RATIO)
    above = grow[min(count, len(grow) - 1)].item()
    below = prune[min(count, len(prune) - 1)].item()
    removed_I[score_I > above] = False
    removed_I[score_I < below] = True


def times_of_stages(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds that runs on a random model of one block have in their reports."""
    # The checkpoint's tokens are single bytes.
    letters = random.Random(0).choices("etaoinshrdlu ", k=5 * given.sequences * given.tokens)
    (folder / "text.txt").write_text("".join(letters), encoding="utf-8")
    sizes = {name: getattr(given, name) for name in SMOLLM2}
    write_checkpoint(folder / "model", blocks=1, vocabulary=4096, **sizes)
    text = {"source": str(folder / "text.txt"), "samples": given.sequences, "length": given.tokens}
    common = {"pattern": given.pattern, "calibration": text}
    common |= {"device": given.device, "dtype": given.dtype}
    times = dict.fromkeys(RUNS, float("inf"))
    for _ in range(given.repeats):
        for name, (stages, phases) in RUNS.items():
            recipe = Recipe.from_mapping({**common, "stages": stages})
            report = prune(folder / "model", recipe, folder / "pruned", restart=True).report
            seconds = sum(report.blocks[0].seconds[phase] for phase in phases)
            times[name] = min(times[name], seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SMOLLM2.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--sequences", type=int, default=32, help="a quarter is held out")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()

    device = resolve_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        seconds = times_of_stages(given, Path(folder))
    # Its threshold over the row does not keep groups.
    if ":" not in given.pattern:
        released, own = Transcribed(given, device), []
        for _ in range(given.repeats):
            released.reset()
            own.append(timed(released.run, device))
        seconds = {"transcribed": min(own), **seconds}
    print(
        f"pattern {given.pattern}, {given.sequences} sequences of {given.tokens} tokens, "
        f"{device.type}, {torch.get_num_threads()} threads\n\n"
        "| contender | time | transcribed / this | this / sparsegpt |\n|---|---:|---:|---:|"
    )
    whole = seconds.get("transcribed")
    for name, value in seconds.items():
        ratio = f"{whole / value:.1f}" if whole else ""
        print(f"| {name} | {value:.2f} s | {ratio} | {value / seconds['sparsegpt']:.2f} |")


if __name__ == "__main__":
    main()
