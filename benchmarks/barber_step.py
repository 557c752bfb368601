"""Time of rebuilding the masks of one block, beside LLM-Barber's procedure as it was released.

    OMP_NUM_THREADS=1 python benchmarks/barber_step.py
    python benchmarks/barber_step.py --hidden 4096 --ffn 11008 --heads 32 --device cuda

One decoder block with random weights, by default with the shapes of SmolLM2-135M, pruned by
magnitude. Contenders:

- transcribed: LLM-Barber's steps one by one: fp32, one sequence at a time, four forwards of the
  block, two thresholds for each row in a loop over rows;
- barber: the stage, with its acceptance on held-out sequences;
- swaps: the stage, with its acceptance;
- sparsegpt: one pass of SparseGPT over the block from its dense weights, statistics included.

All see the same fitted sequences. Each runs once after a round of one batch that warms up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.timing import timed
from random_llama import Shapes, write_checkpoint
from secateur.blocks.passes import Part, catch_call, find_parts
from secateur.blocks.replay import Replay
from secateur.blocks.streams import Batches, Stream
from secateur.blocks.tasks import BlockTask
from secateur.methods.barber import Barber
from secateur.methods.rows import write_masks
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.stage import BlockStage
from secateur.methods.swaps import Swaps
from secateur.models.experts import linear_shapes
from secateur.models.resident import ResidentStore
from secateur.models.structure import find_blocks, find_linears
from secateur.patterns.pattern import Budget, Pattern, parse_pattern, select
from secateur.patterns.plan import uniform_plan
from secateur.pruning.pruned import OpenBlock, PrunedBlock
from secateur.pruning.walk import BlockPruner
from secateur.runs.device import resolve_device, resolve_dtype

BATCH = 4
RATIO = 0.01
PRUNED_BY_MAGNITUDE = "0.5"


@dataclass
class Problem:
    """A block pruned by magnitude, in a stream of random sequences."""

    task: BlockTask
    fp32: Stream

    def reset(self) -> None:
        task = self.task
        for name, dense_OI in task.dense.items():
            budget = Budget(task.pattern, (len(dense_OI),), (task.zeros[name],))
            task.masks[name] = select(dense_OI.abs(), budget, "row").cpu()
        write_masks(task, {name: mask.to(task.device) for name, mask in task.masks.items()})


def make_problem(arguments: argparse.Namespace, pattern: Pattern) -> Problem:
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    shapes = Shapes(
        blocks=1,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        heads=arguments.heads,
        key_value_heads=arguments.key_value_heads,
        vocabulary=4096,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", shapes)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    store = ResidentStore(find_blocks(model.eval()), None, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (arguments.sequences, arguments.tokens), generator=generator)
    batches = Batches.of(*ids.shape, BATCH * arguments.tokens)
    stream, fp32 = (
        Stream(store, ids, batches, device, kind, None, 10**11, sizes=(1, BATCH))
        for kind in (dtype, torch.float32)
    )
    block = store.load(0).requires_grad_(False)
    linears = tuple(find_linears(block))
    prefix = f"{store.blocks.name(0)}."
    task = BlockTask(
        name="block",
        block=block,
        linears=linears,
        dense={linear.name: linear.weight_OI.clone() for linear in linears},
        masks={},
        zeros={
            name.removeprefix(prefix): zeros
            for name, zeros in uniform_plan(linear_shapes(store.blocks), pattern).zeros.items()
        },
        pattern=pattern,
        stored=torch.float32,
        mean_squares={},
        stream=stream,
        targets={"pruned": torch.cat([stream.forward(block, b).cpu() for b in batches.all])},
        generator=generator,
    )
    return Problem(task, fp32)


def transcribed(problem: Problem) -> None:
    """Both parts of the block: score, rebuild, and a pass over the result."""
    task = replace(problem.task, stream=problem.fp32)
    sequences = range(task.stream.batches.boundary)
    for part in find_parts(task.block, task.linears):
        squares = {linear.name: torch.zeros_like(linear.weight_OI) for linear in part.linears}
        for sequence in sequences:
            for name, gradient_OI in sequence_gradients(task, part, sequence).items():
                squares[name] += gradient_OI.square() / len(sequences)
        for linear in part.linears:
            dense_OI = task.dense[linear.name]
            score_OI = dense_OI.abs() * squares[linear.name].sqrt()
            removed_OI = linear.weight_OI == 0
            for row in range(len(score_OI)):
                rebuild_row(score_OI[row], removed_OI[row])
            linear.weight_OI.copy_(dense_OI * ~removed_OI)
        with torch.no_grad():
            for sequence in sequences:
                task.output(slice(sequence, sequence + 1))


def sequence_gradients(task: BlockTask, part: Part, sequence: int) -> dict[str, Tensor]:
    """Gradient of one sequence's error at the dense weights of a part."""
    batch = slice(sequence, sequence + 1)
    with torch.no_grad():
        call = catch_call(part, lambda: task.output(batch))
        assert call is not None
        target = call.output()
        # The released code runs the block to its end in this pass.
        task.output(batch)
    weights = {
        linear.name: task.dense[linear.name].clone().requires_grad_() for linear in part.linears
    }
    loss = torch.nn.functional.mse_loss(call.output_with(weights), target)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


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


def rebuilt(problem: Problem, stage: BlockStage) -> None:
    stage.apply(problem.task)


def sparsegpt(problem: Problem) -> None:
    """One pass over the dense block, from statistics to rounded weights."""
    task = problem.task
    write_masks(task, {})
    stages = (SparseGPT(refit_iterations=0),)
    pruner = BlockPruner(stages, task.pattern, task.device, task.stream.dtype, seed=0)
    targets = pruner.look(task.block, task.stream, None)
    with Replay(task.block) as replay:
        work = OpenBlock(
            task.name,
            task.block,
            task.linears,
            task.stream,
            task.zeros,
            task.stored,
            replay,
            PrunedBlock(0),
        )
        pruner.prune(work, targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-value-heads", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32, help="a quarter is held out")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pattern", default=PRUNED_BY_MAGNITUDE)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    problem = make_problem(arguments, parse_pattern(arguments.pattern))
    task = problem.task
    contenders: dict[str, Callable[[], None]] = {
        "transcribed": lambda: transcribed(problem),
        "barber": lambda: rebuilt(problem, Barber(ratio=RATIO, batch_sequences=BATCH)),
        "swaps": lambda: rebuilt(problem, Swaps(batch_sequences=BATCH)),
        "sparsegpt": lambda: sparsegpt(problem),
    }
    if ":" in arguments.pattern:
        # Its threshold over the row does not keep groups.
        del contenders["transcribed"]
    seconds = dict.fromkeys(contenders, torch.inf)
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            problem.reset()
            seconds[name] = min(seconds[name], timed(run, task.device))

    weights = sum(dense_OI.numel() for dense_OI in task.dense.values())
    print(
        f"{weights / 1e6:.2f} M weights, pattern {arguments.pattern}, {arguments.sequences} "
        f"sequences of {arguments.tokens} tokens, {task.stream.dtype}, {task.device.type}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| contender | time | transcribed / this | this / sparsegpt |\n|---|---:|---:|---:|")
    whole = seconds.get("transcribed")
    for name, value in seconds.items():
        ratio = f"{whole / value:.1f}" if whole else ""
        print(f"| {name} | {value:.2f} s | {ratio} | {value / seconds['sparsegpt']:.2f} |")


if __name__ == "__main__":
    main()
