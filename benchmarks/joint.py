"""Prune and quantise one model in several ways, and count and evaluate what each has saved.

    python benchmarks/joint.py --model DIR --calibration c4.jsonl --text wikitext2_test.txt \\
        --peer-env .venv-peers --output results.json --markdown table.md

Half the weights go and the others become four-bit integers: by BESA, with or without learned
clipping; by rates of rows and a refit, with or without trained scales; by Wanda and a refit, then
with error feedback or rounded to nearest; and by llm-compressor, its SparseGPT and then its GPTQ.
All are packed checkpoints, whose zeros are counted after unpacking. Results are written as they
come, and a run that is already in the output file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.bench import Bench, add_reuse, reused
from harness.contender import OURS, PEER
from harness.measuring import Json, digest_of, made_folder, measure, same_tokens
from harness.results import REPOSITORY, Results
from harness.table import protocol_lines, publish
from secateur.runs.processes import apart


@dataclass(frozen=True)
class Way:
    """How to prune and quantise.

    Attributes:
        name: as in the results.
        label: as in the table.
        stages: of our recipe, before quantize; none for the other tool.
        solver: of our stage quantize.
        clip_rate: of our stage besa, if not its default.
        scales: our stage of that name follows.
    """

    name: str
    label: str
    stages: tuple[str, ...] = ()
    solver: str = "feedback"
    clip_rate: float | None = None
    scales: bool = False

    @property
    def tool(self) -> str:
        """Whose it is."""
        return OURS if self.stages else PEER


WAYS = (
    Way("peer", "SparseGPT, then GPTQ"),
    Way("besa", "besa + refit + quantize", ("besa", "refit")),
    Way(
        "joint",
        "besa with learned clipping + refit + quantize",
        ("besa", "refit"),
        clip_rate=0.05,
    ),
    Way("clipped", "besa with learned clipping, rounded to nearest", ("besa",), "round"),
    Way("rates", "besa-rates + refit + quantize", ("besa-rates", "refit")),
    Way(
        "scales",
        "besa-rates + refit + quantize + scales",
        ("besa-rates", "refit"),
        scales=True,
    ),
    Way("feedback", "wanda + refit + quantize", ("wanda", "refit")),
    Way("round", "wanda + refit, rounded to nearest", ("wanda", "refit"), "round"),
)


def recipe(way: Way, arguments: argparse.Namespace) -> Json:
    """Return the recipe of one of our ways, as it is written to a file."""
    quantize = {"method": "quantize", "bits": arguments.bits, "group": arguments.group}
    stages: list[Json] = [{"method": name} for name in way.stages]
    if way.clip_rate is not None:
        stages[0]["clip_rate"] = way.clip_rate
    stages.append({**quantize, "solver": way.solver})
    if way.scales:
        stages.append({"method": "scales"})
    calibration = {
        "source": str(arguments.calibration),
        "samples": arguments.samples,
        "length": arguments.length,
        "seed": arguments.seed,
    }
    return {"pattern": str(arguments.sparsity), "stages": stages, "calibration": calibration}


def run(way: Way, bench: Bench, arguments: argparse.Namespace) -> Json:
    """Run one way once; measure, count and evaluate what it has saved.

    Raises:
        SystemExit: it failed, or calibrated on other tokens than the shared ones.
    """
    output = bench.work / "quantised"
    shutil.rmtree(output, ignore_errors=True)
    if way.tool == PEER:
        grid = ["--bits", str(arguments.bits), "--group", str(arguments.group)]
        command = bench.peer_command(
            ["--method", "sparsegpt", "--sparsity", str(arguments.sparsity), *grid], output
        )
    else:
        file = bench.work / "recipe.yaml"
        # JSON is YAML.
        file.write_text(json.dumps(recipe(way, arguments)), encoding="utf-8")
        command = [sys.executable, "-m", "secateur", "prune", str(bench.model)]
        command += ["--recipe", str(file), "--output", str(output)]
    measured = measure(command, bench.work / f"{way.name}.log")
    if way.tool == OURS and not apart(
        same_tokens, output / "secateur" / "calibration.safetensors", bench.tokens
    ):
        raise SystemExit(f"secateur calibrated on other tokens than {bench.tokens}.")
    entry = {
        "tool": way.tool,
        "contender": way.name,
        **asdict(measured),
        "sparsity": apart(count_unpacked, output),
        "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "perplexity": bench.evaluate(output),
        "files": digest_of(output.glob("*.safetensors")),
    }
    shutil.rmtree(output)
    return entry


def count_unpacked(folder: Path) -> float:
    """Return the share of zeros in the linears of the blocks of a packed checkpoint."""
    from secateur.models.inspection import inspect

    return inspect(folder).sparsity


def table(results: Results, dense: Json) -> list[str]:
    """Return the Markdown table of the fastest run of each way."""
    lines = [
        "| tool | way | counted zeros | perplexity "
        f"(dense {dense['perplexity']:.2f}) | on disk | time | processor time "
        "| peak memory | commit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for way in WAYS:
        best = results.best(way.tool, way)
        if best is not None:
            lines.append(
                f"| {way.tool} | {way.label} | {best['sparsity']:.4f} "
                f"| {best['perplexity']:.2f} | {best['bytes'] / 1e6:.0f} MB "
                f"| {best['seconds']:.0f} s | {best['cpu_seconds']:.0f} s "
                f"| {best['peak_bytes'] / 1e9:.2f} GB | {best['commit']} |"
            )
    return [*lines, "", *protocol_lines(results.settings)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--ways", default=",".join(way.name for way in WAYS), help="comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-env", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--peer-python", type=Path, help="an interpreter to use as it is")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="its default is 1")
    add_reuse(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument(
        "--work", type=made_folder, help="folder for temporary checkpoints and logs"
    )
    return parser.parse_args()


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    arguments = parse_arguments()
    # As an exception, so that what is running and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work) as work:
        run_all(arguments, Path(work))


def run_all(arguments: argparse.Namespace, work: Path) -> None:
    """Run what is asked for and not yet in the output file, then print the table."""
    named = {way.name: way for way in WAYS}
    chosen = [named[name] for name in arguments.ways.split(",")]
    with_peer = any(way.tool == PEER for way in chosen)
    bench = Bench.of(arguments, work, arguments.max_windows, with_peer=with_peer)
    grid = {name: getattr(arguments, name) for name in ("sparsity", "bits", "group")}
    results = Results(
        arguments.output,
        {**bench.settings(), **grid},
        reused(arguments),
        any_machine=arguments.any_machine,
        only_of={"peer": PEER},
    )
    dense = results.dense(bench.dense)
    for way in chosen:
        for _ in range(len(results.runs(way.tool, way)), arguments.repeats):
            print(f"{way.tool} {way.name}", file=sys.stderr, flush=True)
            results.add("runs", run(way, bench, arguments))
    publish(table(results, dense), arguments.markdown)


if __name__ == "__main__":
    main()
