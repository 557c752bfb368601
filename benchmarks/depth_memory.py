"""Measure that the peak memory of pruning does not grow with the number of blocks.

    python benchmarks/depth_memory.py --blocks 4,16 --methods wanda,sparsegpt

For each depth: write a random-weight Llama checkpoint, prune it with each method on a little text,
and print the peak resident size of the process beside what `secateur estimate` says. The disk of
the work folder must hold the deepest one twice. Further options, such as --hidden, go to
random_llama.py.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.runs.files import remove
from secateur.runs.processes import measure, output_of

SECATEUR = [sys.executable, "-m", "secateur"]


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
    parser.add_argument("--work", type=Path, help="folder for temporary checkpoints")
    given, sizes = parser.parse_known_args()
    windows = ["--samples", str(given.samples), "--length", str(given.length)]
    first: dict[str, int] = {}
    print("| method | blocks | peak memory | ratio | estimated | time |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="depth-memory-", dir=given.work) as folder:
        work = Path(folder)
        # Seeded random letters; the checkpoint's tokens are single bytes.
        letters = random.Random(0).choices("etaoinshrdlu ", k=5 * given.samples * given.length)
        (work / "text.txt").write_text("".join(letters), encoding="utf-8")
        for blocks in given.blocks.split(","):
            model, output = work / f"{blocks}-blocks", work / "pruned"
            maker = [sys.executable, str(Path(__file__).with_name("random_llama.py")), str(model)]
            subprocess.run([*maker, "--blocks", blocks, *sizes], check=True)
            for method in given.methods.split(","):
                flags = ["--method", method, "--no-refit", "--sparsity", "0.5", *windows]
                estimate = [*SECATEUR, "estimate", str(model), *flags, "--json"]
                expected = json.loads(output_of(estimate, work / "log"))["peak_memory_bytes"]
                prune = [*SECATEUR, "prune", str(model), *flags, "--output", str(output)]
                prune += ["--calibration", str(work / "text.txt")]
                cost = measure(prune, work / "log")
                remove(output)
                ratio = cost.peak_bytes / first.setdefault(method, cost.peak_bytes)
                print(
                    f"| {method} | {blocks} | {cost.peak_bytes / 1e9:.2f} GB | {ratio:.2f} "
                    f"| {expected / 1e9:.2f} GB | {cost.seconds:.0f} s |",
                    flush=True,
                )
            remove(model)


if __name__ == "__main__":
    main()
