"""Time and memory of one BESA optimisation step, beside the procedure as it was released.

    OMP_NUM_THREADS=1 python benchmarks/besa_step.py
    python benchmarks/besa_step.py --hidden 4096 --ffn 11008 --heads 32 --key-value-heads 32 \
        --tokens 2048 --dtype bfloat16 --device cuda

One decoder block with random weights, by default with the shapes of SmolLM2-135M. Contenders:

- dense: forward and backward through the block with frozen weights, what any such method needs;
- released: int64 permutations, survival probabilities and masks made densely in every forward,
  101 logits per row, Prodigy;
- candidates: the same learning by `secateur.solvers.besa`, as `besa` does it by default;
- rates: the step of `besa-rates`, costs of rows that follow the slope of the loss.

A step is forward, loss, backward and update, its time given for one sequence. A pass is the forward
of a sequence through the finished block. A block is what learning takes in all: steps and passes
over 128 sequences for the released procedure, over those that the defaults take for ours.
Contenders take turns and the fastest time of each counts. Extra memory is the peak during a step
of few tokens beyond that of the dense contender, per weight of the block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.nn import functional

from costs import peak_bytes, timed
from random_llama import SMOLLM2, random_block
from secateur.methods.besa import BESA
from secateur.methods.besa_rates import BESARates
from secateur.methods.descent import stepping
from secateur.solvers.besa import apply_counts, ascending_ranks, masked_linear, thresholded_linear
from secateur.solvers.block_loss import relative_loss
from secateur.solvers.margin import RowCosts, cheapest, follow_margin, margin_threshold
from secateur.solvers.rates import (
    candidate_counts,
    candidate_rates,
    expected_rate,
    mean_rate,
    rate_distribution,
    sparsity_penalty,
    truncated_counts,
)
from secateur.solvers.scores import wanda_score

TARGET = 0.5
PENALTY = 5.0
MEMORY_TOKENS = 16
# Calibration, the part that is fitted, and held-out sequences that masks are compared on.
SEQUENCES, FITTED, JUDGED = 128, 96, 8


class Dense:
    """A way to run the block with masked weights and to learn the masks; here there are none.

    Attributes:
        sequences: that it takes in one step.
        work: sequences of steps, and of passes, that a block takes.
    """

    sequences = 1
    work = (SEQUENCES, SEQUENCES)
    finished: list[Tensor] | None = None

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self.weights = weights

    def linear(self, index: int, x: Tensor) -> Tensor:
        """Output of one linear; of the finished one, once learning is over."""
        if self.finished:
            return functional.linear(x, self.finished[index])
        return self.masked(index, x)

    def masked(self, index: int, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[index])

    def step(self, output: Tensor, reference: Tensor) -> None:
        relative_loss(output, reference).backward()

    def finish(self) -> None:
        """Learning is over."""


class Released(Dense):
    """Section by section what the released code does; everything dense, in every forward."""

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        super().__init__(weights, squares)
        device = weights[0].device
        self.orders = [
            wanda_score(w, square).sort(dim=1, stable=True).indices
            for w, square in zip(weights, squares, strict=True)
        ]
        self.rates = torch.linspace(1, 0, 101, device=device)
        self.probability_maps = [
            (
                torch.arange(w.shape[1], device=device) < (w.shape[1] * self.rates).long()[:, None]
            ).float()
            for w in weights
        ]
        self.logits = [torch.zeros(len(w), 101, device=device).requires_grad_() for w in weights]
        self.alphas: list[Tensor] = [w.new_zeros(len(w)) for w in weights]
        self.optimiser = Prodigy(self.logits, d_coef=5.0)

    def masked(self, index: int, x: Tensor) -> Tensor:
        w, order = self.weights[index], self.orders[index]
        beta = self.logits[index].sigmoid().softmax(dim=-1)
        alpha = beta @ self.rates
        survival_in_order = 1 - beta @ self.probability_maps[index]
        survival = torch.zeros_like(w).scatter(1, order, survival_in_order.to(w.dtype))
        positions = torch.arange(w.shape[1], device=w.device)
        kept_in_order = (positions >= (alpha * w.shape[1]).long()[:, None]).to(w.dtype)
        mask = torch.ones_like(w).scatter(1, order, kept_in_order)
        mask = mask - survival.detach() + survival
        self.alphas[index] = alpha
        return functional.linear(x, w * mask)

    def step(self, output: Tensor, reference: Tensor) -> None:
        norm = reference.float().flatten(0, -2).norm(dim=0).detach()
        error = (reference.float() - output.float()) / norm
        reconstruction = error.square().sum(dim=(0, 1)).mean()
        total = sum(w.numel() for w in self.weights)
        rate = sum(
            alpha.mean() * (w.numel() / total)
            for alpha, w in zip(self.alphas, self.weights, strict=True)
        )
        loss = reconstruction + PENALTY * ((rate - TARGET) / TARGET) ** 2
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if output.is_cuda:
            torch.cuda.empty_cache()
        loss.item()


class Candidates(Dense):
    work = (FITTED * BESA().epochs, SEQUENCES + 2 * JUDGED)

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        super().__init__(weights, squares)
        device = weights[0].device
        self.ranks = [
            ascending_ranks(wanda_score(w, square))
            for w, square in zip(weights, squares, strict=True)
        ]
        self.rates = candidate_rates()
        self.candidates = [
            torch.tensor(candidate_counts(self.rates, w.shape[1])).to(device) for w in weights
        ]
        self.logits = [torch.zeros(len(w), len(self.rates), device=device) for w in weights]
        self.counts = [torch.zeros(len(w), device=device) for w in weights]
        self.alphas = list(self.counts)
        self.training = ExitStack()
        self.training.enter_context(stepping(dict.fromkeys(self.logits, BESA().learning_rate)))

    def masked(self, index: int, x: Tensor) -> Tensor:
        w = self.weights[index]
        beta = rate_distribution(self.logits[index], smooth=False)
        alpha = expected_rate(beta, self.rates)
        count = truncated_counts(alpha, *w.shape)
        self.alphas[index], self.counts[index] = alpha, count
        return masked_linear(x, w, self.ranks[index], count, beta, self.candidates[index])

    def step(self, output: Tensor, reference: Tensor) -> None:
        rate = mean_rate(self.alphas, [w.numel() for w in self.weights])
        loss = relative_loss(output, reference) + sparsity_penalty(rate, TARGET, PENALTY)
        loss.backward()
        self.alphas = list(self.counts)
        loss.item()

    def finish(self) -> None:
        parts = zip(self.weights, self.ranks, self.counts, strict=True)
        self.finished = [apply_counts(w, rank, count) for w, rank, count in parts]


class Rates(Dense):
    options = BESARates()
    sequences = options.batch_sequences
    work = (options.probe_sequences + options.steps * sequences, SEQUENCES + 3 * JUDGED)

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        super().__init__(weights, squares)
        self.costs = [
            RowCosts(w, square.sqrt(), torch.ones(len(w), device=w.device))
            for w, square in zip(weights, squares, strict=True)
        ]
        self.removed = [torch.zeros(len(w), device=w.device).requires_grad_() for w in weights]
        self.threshold = margin_threshold(self.costs, TARGET)

    def masked(self, index: int, x: Tensor) -> Tensor:
        return thresholded_linear(x, self.costs[index], self.threshold, self.removed[index])

    def step(self, output: Tensor, reference: Tensor) -> None:
        loss = relative_loss(output, reference)
        loss.backward()
        for each, removed in zip(self.costs, self.removed, strict=True):
            follow_margin(each.root_O, removed.grad, self.threshold, pull=0.5)
            removed.grad = None
        self.threshold = margin_threshold(self.costs, TARGET)
        loss.item()

    def finish(self) -> None:
        zeros = round(TARGET * sum(each.w_OI.numel() for each in self.costs))
        masks = cheapest(self.costs, zeros)
        self.finished = [
            each.w_OI.where(mask, 0) for each, mask in zip(self.costs, masks, strict=True)
        ]


CONTENDERS: dict[str, type[Dense]] = {
    "dense": Dense,
    "released": Released,
    "candidates": Candidates,
    "rates": Rates,
}


class Routed(nn.Module):
    """Stands where a linear was and asks the contender."""

    def __init__(self, index: int, contender: Dense) -> None:
        super().__init__()
        self.index, self.contender = index, contender

    def forward(self, x: Tensor) -> Tensor:
        return self.contender.linear(self.index, x)


@dataclass
class Problem:
    """A block, its inputs and its dense outputs."""

    block: nn.Module
    weights: list[Tensor]
    squares: list[Tensor]
    x: Tensor
    rotary: tuple[Tensor, Tensor]
    autocast: Callable[[], Any]

    @classmethod
    def make(cls, arguments: argparse.Namespace, tokens: int) -> Problem:
        device = torch.device(arguments.device)
        sizes = argparse.Namespace(**{**vars(arguments), "tokens": tokens})
        block, x, rotary = random_block(sizes, Rates.sequences, device)
        weights: list[Tensor] = []
        dense = Dense(weights, [])
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                # Rows of unequal importance, as in a trained model.
                scale = torch.randn(len(module.weight), 1, device=device).exp()
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, Routed(len(weights), dense))
                weights.append((module.weight * scale).detach())
        squares = [torch.rand(w.shape[1], device=device) for w in weights]
        low = partial(torch.autocast, device.type, dtype=torch.bfloat16)
        autocast = low if arguments.dtype == "bfloat16" else nullcontext
        return cls(block, weights, squares, x, rotary, autocast)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.reference = self.run(Dense(self.weights, []), len(self.x))

    def run(self, contender: Dense, sequences: int | None = None) -> Tensor:
        for module in self.block.modules():
            if isinstance(module, Routed):
                module.contender = contender
        with self.autocast():
            x = self.x[: sequences or contender.sequences]
            output = self.block(x, position_embeddings=self.rotary)
        return output[0] if isinstance(output, tuple) else output

    def step(self, contender: Dense) -> None:
        # Something must ask for gradients, or there is no backward pass.
        self.x.requires_grad_(type(contender) is Dense)
        contender.step(self.run(contender), self.reference[: contender.sequences])
        self.x.grad = None
        self.x.requires_grad_(False)

    def stepper(self, name: str) -> Callable[[], None]:
        return partial(self.step, CONTENDERS[name](self.weights, self.squares))


def measure(problem: Problem, steps: int) -> dict[str, tuple[float, float]]:
    """Fastest step and fastest pass of each contender, by sequence; they take turns."""
    everyone = {name: make(problem.weights, problem.squares) for name, make in CONTENDERS.items()}

    def fastest(run: Callable[[Dense], object]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in everyone}
        for _ in range(steps + 1):
            for name, contender in everyone.items():
                seconds = timed(partial(run, contender), problem.x.device)
                times[name].append(seconds / contender.sequences)
        return {name: min(each[1:]) for name, each in times.items()}

    stepping_times = fastest(problem.step)
    for contender in everyone.values():
        contender.finish()
    with torch.no_grad():
        passing_times = fastest(problem.run)
    return {name: (stepping_times[name], passing_times[name]) for name in everyone}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {**SMOLLM2, "tokens": 512, "steps": 5}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    problem = Problem.make(arguments, arguments.tokens)
    size, device = sum(w.numel() for w in problem.weights), problem.x.device
    seconds = measure(problem, arguments.steps)
    # So few tokens that activations do not count.
    problem = Problem.make(arguments, MEMORY_TOKENS)
    peaks = {name: peak_bytes(partial(problem.stepper, name), device) for name in CONTENDERS}
    print(
        f"{size / 1e6:.2f} M weights, {arguments.tokens} tokens, {arguments.dtype}, "
        f"{device.type}, {torch.get_num_threads()} threads\n\n"
        "| contender | step | released / this | pass | released / this | block | released / this "
        "| extra bytes per weight |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    columns = {}
    for name, (step, after) in seconds.items():
        steps, passes = CONTENDERS[name].work
        columns[name] = (step, after, steps * step + passes * after)
    for name, times in columns.items():
        texts = (f"{1e3 * times[0]:.1f} ms", f"{1e3 * times[1]:.1f} ms", f"{times[2]:.1f} s")
        ratios = (f"{old / new:.2f}" for old, new in zip(columns["released"], times, strict=True))
        cells = [cell for pair in zip(texts, ratios, strict=True) for cell in pair]
        extra = (peaks[name] - peaks["dense"]) / size
        print(f"| {name} | {' | '.join(cells)} | {extra:.2f} |")


if __name__ == "__main__":
    main()
