"""Time and memory of one BESA optimisation step, beside the procedure as it was released.

    OMP_NUM_THREADS=1 python benchmarks/besa_step.py
    python benchmarks/besa_step.py --hidden 4096 --ffn 11008 --heads 32 --key-value-heads 32 \
        --tokens 2048 --dtype bfloat16 --device cuda

One decoder block with random weights, by default with the shapes of SmolLM2-135M. Four contenders:

- dense: forward and backward through the block with frozen weights, what any such method needs;
- released: int64 permutations, survival probabilities and masks made densely in every forward,
  101 logits per row, Prodigy;
- candidates: the same learning by `secateur.solvers.besa` as `besa` does it by default, with Adam;
- rates: the step of `besa-rates`, costs of rows that follow the slope of the loss.

A step is forward, loss, backward and update, its time given for one sequence: `besa-rates` takes
two at a time, the others one. After learning, every sequence passes through the block once more to
become the next block's input; the released procedure makes its masks again for each, ours
multiplies them into the weights once. A block is what learning takes in all:
128 sequences of steps for the released procedure; for ours those that the defaults fit to, probes
like steps, and the held-out sequences that its masks are compared on; and the 128 sequences of the
pass. Contenders take turns and the fastest time of each counts. Extra memory is the peak during a
step of few tokens beyond that of the dense contender, per weight of the block; ranks, logits and
the state of the optimiser are in it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from harness.memory import LiveBytes
from harness.timing import timed
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

SEQUENCES = 128
FITTED = 96
# Held-out sequences that masks are compared on, as many as hold 4096 tokens.
JUDGED = 8


class Contender:
    """A way to run the block with masked weights and to learn the masks.

    Attributes:
        sequences: that it takes in one step.
    """

    sequences = 1

    def linear(self, index: int, x: Tensor) -> Tensor:
        """Output of one linear while masks are learned."""
        raise NotImplementedError

    def step(self, output: Tensor, reference: Tensor) -> float:
        """Learn from one sequence."""
        raise NotImplementedError

    def finish(self) -> None:
        """Learning is over."""


class Dense(Contender):
    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self.weights = weights

    def linear(self, index: int, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[index])

    def step(self, output: Tensor, reference: Tensor) -> float:
        loss = relative_loss(output, reference)
        loss.backward()
        return loss.item()


class Released(Contender):
    """Section by section what the released code does; everything dense, in every forward."""

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self.weights = weights
        device = weights[0].device
        self.orders = [
            wanda_score(w, square).sort(dim=1, stable=True).indices
            for w, square in zip(weights, squares, strict=True)
        ]
        self.rates = torch.linspace(1, 0, 101, device=device)
        self.probability_maps = []
        for w in weights:
            columns = w.shape[1]
            positions = torch.arange(columns, device=device)
            removed = positions < (columns * self.rates).long()[:, None]
            self.probability_maps.append(removed.float())
        self.logits = [torch.zeros(len(w), 101, device=device).requires_grad_() for w in weights]
        self.alphas: list[Tensor] = [w.new_zeros(len(w)) for w in weights]
        self.optimiser = Prodigy(self.logits, d_coef=5.0)

    def linear(self, index: int, x: Tensor) -> Tensor:
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

    def step(self, output: Tensor, reference: Tensor) -> float:
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
        return loss.item()


class Finished(Contender):
    """Masks are multiplied into the weights once."""

    weights: Sequence[Tensor]
    ranks: Sequence[Tensor]
    counts: Sequence[Tensor]
    finished: list[Tensor] | None = None

    def finish(self) -> None:
        parts = zip(self.weights, self.ranks, self.counts, strict=True)
        self.finished = [apply_counts(w, rank, count) for w, rank, count in parts]


class Candidates(Finished):
    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self.weights = weights
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
        rates = dict.fromkeys(self.logits, BESA().learning_rate)
        self.training = ExitStack()
        self.training.enter_context(stepping(rates))

    def linear(self, index: int, x: Tensor) -> Tensor:
        w = self.weights[index]
        if self.finished:
            return functional.linear(x, self.finished[index])
        beta = rate_distribution(self.logits[index], smooth=False)
        alpha = expected_rate(beta, self.rates)
        count = truncated_counts(alpha, *w.shape)
        self.alphas[index], self.counts[index] = alpha, count
        return masked_linear(x, w, self.ranks[index], count, beta, self.candidates[index])

    def step(self, output: Tensor, reference: Tensor) -> float:
        rate = mean_rate(self.alphas, [w.numel() for w in self.weights])
        loss = relative_loss(output, reference) + sparsity_penalty(rate, TARGET, PENALTY)
        loss.backward()
        self.alphas = list(self.counts)
        return loss.item()


class Rates(Contender):
    """`besa-rates`: costs of whole rows follow the loss's slope at their margin."""

    sequences = BESARates().batch_sequences
    finished: list[Tensor] | None = None

    def __init__(self, weights: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self.costs = [
            RowCosts(w, square.sqrt(), torch.ones(len(w), device=w.device))
            for w, square in zip(weights, squares, strict=True)
        ]
        self.removed = [torch.zeros(len(w), device=w.device).requires_grad_() for w in weights]
        self.threshold = margin_threshold(self.costs, TARGET)

    def linear(self, index: int, x: Tensor) -> Tensor:
        if self.finished:
            return functional.linear(x, self.finished[index])
        return thresholded_linear(x, self.costs[index], self.threshold, self.removed[index])

    def step(self, output: Tensor, reference: Tensor) -> float:
        loss = relative_loss(output, reference)
        loss.backward()
        for each, removed in zip(self.costs, self.removed, strict=True):
            assert removed.grad is not None
            follow_margin(each.root_O, removed.grad, self.threshold, pull=0.5)
            removed.grad = None
        self.threshold = margin_threshold(self.costs, TARGET)
        return loss.item()

    def finish(self) -> None:
        zeros = round(TARGET * sum(each.w_OI.numel() for each in self.costs))
        masks = cheapest(self.costs, zeros)
        self.finished = [
            each.w_OI.where(mask, 0) for each, mask in zip(self.costs, masks, strict=True)
        ]


CONTENDERS: dict[str, type] = {
    "dense": Dense,
    "released": Released,
    "candidates": Candidates,
    "rates": Rates,
}


def work(name: str) -> tuple[int, int]:
    """Sequences of steps, and of passes, that a block takes."""
    rates = BESARates()
    return {
        "dense": (SEQUENCES, SEQUENCES),
        "released": (SEQUENCES, SEQUENCES),
        "candidates": (FITTED * BESA().epochs, SEQUENCES + 2 * JUDGED),
        "rates": (
            rates.probe_sequences + rates.steps * rates.batch_sequences,
            SEQUENCES + 3 * JUDGED,
        ),
    }[name]


class Routed(nn.Module):
    """Stands where a linear was and asks the contender."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.contender: Contender | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.contender is not None
        return self.contender.linear(self.index, x)


@dataclass
class Problem:
    """A block, its inputs and its dense outputs."""

    block: nn.Module
    routes: list[Routed]
    weights: list[Tensor]
    squares: list[Tensor]
    x: Tensor
    rotary: tuple[Tensor, Tensor]
    autocast: Callable[[], Any]
    reference: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(self, contender: Contender, sequences: int | None = None) -> Tensor:
        for route in self.routes:
            route.contender = contender
        with self.autocast():
            x = self.x[: sequences or contender.sequences]
            output = self.block(x, position_embeddings=self.rotary)
        return output[0] if isinstance(output, tuple) else output


def make_problem(arguments: argparse.Namespace, tokens: int) -> Problem:
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    low = torch.bfloat16 if arguments.dtype == "bfloat16" else None
    block = LlamaDecoderLayer(config, layer_idx=0).to(device).requires_grad_(False)
    x = torch.randn(Rates.sequences, tokens, arguments.hidden, device=device)
    positions = torch.arange(tokens, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(x, positions)
    routes, weights = [], []
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            # Rows of unequal importance, as in a trained model.
            scale = torch.randn(len(module.weight), 1, device=device).exp()
            weights.append((module.weight * scale).detach())
            routes.append(Routed(len(routes)))
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, routes[-1])
    squares = [torch.rand(w.shape[1], device=device) for w in weights]

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=low) if low else nullcontext()

    problem = Problem(block, routes, weights, squares, x, rotary, autocast)
    with torch.no_grad():
        problem.reference = problem.run(Dense(weights, []), len(x))
    return problem


def measure(problem: Problem, names: Sequence[str], steps: int) -> dict[str, tuple[float, float]]:
    """Fastest step and fastest pass of each contender, by sequence; they take turns."""
    contenders = {name: CONTENDERS[name](problem.weights, problem.squares) for name in names}
    device = problem.x.device
    step_times: dict[str, list[float]] = {name: [] for name in names}
    pass_times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(steps + 1):
        for name, contender in contenders.items():
            step_times[name].append(timed(partial(step_once, problem, contender), device))
    for contender in contenders.values():
        contender.finish()
    with torch.no_grad():
        for _ in range(steps + 1):
            for name, contender in contenders.items():
                pass_times[name].append(timed(partial(problem.run, contender), device))
    return {
        name: (
            min(step_times[name][1:]) / contender.sequences,
            min(pass_times[name][1:]) / contender.sequences,
        )
        for name, contender in contenders.items()
    }


def peak_bytes(problem: Problem, name: str) -> int:
    """Most memory of a contender during a step, its ranks and optimiser included."""
    gc.collect()
    cuda = problem.x.is_cuda
    counter = LiveBytes()
    before = torch.cuda.memory_allocated() if cuda else 0
    with nullcontext() if cuda else counter:
        contender = CONTENDERS[name](problem.weights, problem.squares)
        step_once(problem, contender)  # makes the optimiser's state
        gc.collect()
        counter.peak = counter.live
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step_once(problem, contender)
    return torch.cuda.max_memory_allocated() - before if cuda else counter.peak


def step_once(problem: Problem, contender: Contender) -> None:
    # Something must ask for gradients, or there is no backward pass.
    problem.x.requires_grad_(isinstance(contender, Dense))
    contender.step(problem.run(contender), problem.reference[: contender.sequences])
    problem.x.grad = None
    problem.x.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-value-heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    names = list(CONTENDERS)
    problem = make_problem(arguments, arguments.tokens)
    size = sum(w.numel() for w in problem.weights)
    seconds = measure(problem, names, arguments.steps)
    del problem
    # So few tokens that activations do not count.
    problem = make_problem(arguments, MEMORY_TOKENS)
    peaks = {name: peak_bytes(problem, name) for name in names}

    print(
        f"{size / 1e6:.2f} M weights, {arguments.tokens} tokens, {arguments.dtype}, "
        f"{problem.x.device.type}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| contender | step | released / this | pass | released / this | block | released / this "
        "| extra bytes per weight |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    floor = peaks.get("dense", 0)
    blocks = {
        name: work(name)[0] * step + work(name)[1] * after
        for name, (step, after) in seconds.items()
    }
    for name, (step, after) in seconds.items():
        cells = [name]
        for index, value in enumerate((step, after, blocks[name])):
            released = (*seconds["released"], blocks["released"])[index]
            cells += [f"{1e3 * value:.1f} ms" if index < 2 else f"{value:.1f} s"]
            cells += [f"{released / value:.2f}"]
        cells += [f"{(peaks[name] - floor) / size:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
