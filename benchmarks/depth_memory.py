"""Measure that the peak memory of pruning does not grow with the number of blocks.

    python benchmarks/depth_memory.py --blocks 4,16 --methods wanda,sparsegpt

For each depth: write a random-weight Llama checkpoint, prune it with each method on a little
calibration text, note the peak resident size of the process beside what `secateur estimate` says,
and remove the checkpoints again. The disk of the work folder must hold the deepest one twice.
Further options, such as --hidden, go to random_llama.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.measuring import child_environment, describe_machine, made_folder, measure
from harness.results import commit
from secateur.runs.processes import Measured

HERE = Path(__file__).resolve().parent
SECATEUR = [sys.executable, "-m", "secateur"]


@dataclass(frozen=True)
class Row:
    """One pruning run."""

    method: str
    blocks: int
    measured: Measured
    estimated_bytes: int


def write_text(file: Path, characters: int) -> None:
    """Write seeded random words; the checkpoint's tokens are single bytes."""
    generator = random.Random(0)
    words = (
        "".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9)))
        for _ in range(characters // 3 + 1)
    )
    file.write_text(" ".join(words), encoding="utf-8")


def prune(model: Path, flags: list[str], text: Path, work: Path) -> tuple[Measured, int]:
    """Prune in a process of its own; return its cost and the peak memory that was estimated."""
    estimate = subprocess.run(
        [*SECATEUR, "estimate", str(model), *flags, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=child_environment(),
    )
    output = work / "pruned"
    command = [*SECATEUR, "prune", str(model), *flags, "--calibration", str(text)]
    measured = measure([*command, "--output", str(output)], work / "prune.log")
    shutil.rmtree(output)
    return measured, json.loads(estimate.stdout)["peak_memory_bytes"]


def table(rows: list[Row]) -> list[str]:
    """Return a Markdown table; each ratio is to the shallowest run of the same method."""
    lines = [
        "| method | blocks | peak memory | ratio | estimated | time |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row.method, row.blocks)):
        peak = row.measured.peak_bytes
        shallowest = min((r for r in rows if r.method == row.method), key=lambda r: r.blocks)
        lines.append(
            f"| {row.method} | {row.blocks} | {peak / 1e9:.2f} GB "
            f"| {peak / shallowest.measured.peak_bytes:.2f} "
            f"| {row.estimated_bytes / 1e9:.2f} GB | {row.measured.seconds:.0f} s |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--blocks", default="4,16", help="depths, comma-separated")
    parser.add_argument("--methods", default="wanda", help="comma-separated")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--work", type=made_folder, help="folder for temporary checkpoints")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments, model_options = parser.parse_known_args()
    depths = [int(depth) for depth in arguments.blocks.split(",")]
    windows = ["--samples", str(arguments.samples), "--length", str(arguments.length)]

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="depth-memory-", dir=arguments.work) as folder:
        work = Path(folder)
        text = work / "text.txt"
        write_text(text, 4 * arguments.samples * arguments.length)
        for blocks in depths:
            model = work / f"{blocks}-blocks"
            print(f"Writing {blocks} blocks", file=sys.stderr, flush=True)
            maker = [sys.executable, str(HERE / "random_llama.py"), str(model)]
            subprocess.run([*maker, "--blocks", str(blocks), *model_options], check=True)
            for method in arguments.methods.split(","):
                print(f"Pruning {blocks} blocks with {method}", file=sys.stderr, flush=True)
                flags = ["--method", method, "--no-refit", "--sparsity", "0.5", *windows]
                rows.append(Row(method, blocks, *prune(model, flags, text, work)))
            shutil.rmtree(model)

    machine = describe_machine()
    lines = [
        *table(rows),
        "",
        f"Random weights in bfloat16, {arguments.samples} calibration windows of "
        f"{arguments.length} tokens, peak resident size of the whole process. Machine: "
        f"{machine['cores']} cores, {machine['processor']}, torch {machine['torch']}. "
        f"Commit: {commit()}.",
        f"Command: `{shlex.join(['python', *sys.argv])}`.",
    ]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
