"""Train one model to a pattern by several presets, on the same tokens, and follow perplexity.

    python benchmarks/training.py --model DIR --data FOLDER --validation wikitext2_valid.txt \\
        --text wikitext2_test.txt --tokens 1500000 --output results.json --markdown table.md

Every contender is a whole process from a dense model on disk to a trained one on disk, by
`secateur train`: `default`, which prunes first, `ast`, and any preset with options of its own, as
`NAME=PRESET:FILE.yaml`. Perplexity on the validation text is followed in training, that on the
evaluation text is measured on the saved files; learning rates are chosen by the former. Results
are written as they come, and a run that is already in the output file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.measuring import (
    Json,
    count_zeros,
    describe_machine,
    digest_of,
    made_folder,
    measure,
    perplexity,
)
from harness.results import Results
from harness.table import machine_line, publish


@dataclass(frozen=True)
class Contender:
    """A preset, perhaps with more options, under a label."""

    label: str
    preset: str
    options: Path | None

    @property
    def name(self) -> str:
        """What a result is kept by: options of other content are another contender."""
        if self.options is None:
            return self.label
        return f"{self.label} {self.preset} {digest_of([self.options])}"

    @classmethod
    def parse(cls, text: str) -> Contender:
        label, _, rest = text.partition("=")
        preset, _, file = (rest or label).partition(":")
        return cls(label, preset, Path(file) if file else None)


def command(arguments: argparse.Namespace, contender: Contender, output: Path) -> list[str]:
    """Return the command line of a contender."""
    flags = ["--preset", contender.preset, "--pattern", arguments.pattern]
    flags += ["--data", str(arguments.data), "--validation", str(arguments.validation)]
    for name in ("tokens", "length", "batch_tokens", "seed"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if contender.options is not None:
        flags += ["--options", str(contender.options)]
    model = [str(arguments.model), "--output", str(output)]
    return [sys.executable, "-m", "secateur", "train", *model, *flags]


def run(arguments: argparse.Namespace, contender: Contender, work: Path) -> Json:
    """Run a contender once; measure and evaluate what it has saved."""
    output = work / "trained"
    shutil.rmtree(output, ignore_errors=True)
    measured = measure(command(arguments, contender, output), work / f"{contender.label}.log")
    report = json.loads((output / "report.json").read_text())
    log = (output / "secateur" / "training" / "log.jsonl").read_text().splitlines()
    rates = [entry["flip_rate"] for entry in map(json.loads, log) if "flip_rate" in entry]
    windows = None if arguments.full else arguments.max_windows
    held_out = report["validation"]
    entry = {
        "tool": "training",
        "contender": contender.name,
        **asdict(measured),
        "options": report["options"],
        "phases": report["seconds"],
        "tokens": report["tokens"],
        "violations": count_zeros(output, arguments.pattern).violations
        if ":" in arguments.pattern
        else 0,
        "sparsity": report["sparsity"]["counted"],
        "flip_rates": rates,
        "dense_validation": math.exp(held_out["dense"]),
        "curve": [
            [
                each["step"] * report["tokens"] / report["steps"],
                math.exp(each["validation_loss"]),
            ]
            for each in report["validations"]
        ],
        "validation": math.exp(held_out["after"]),
        "perplexity": perplexity(output, arguments.text, arguments.window, windows),
    }
    shutil.rmtree(output)
    return entry


def table(runs: dict[str, Json], dense: float) -> list[str]:
    """Return the Markdown tables: results, then perplexity against tokens."""
    paper = runs.get("ast")
    lines = [
        f"| contender | perplexity (dense {dense:.2f}) | gap / ast's | validation, before "
        "| validation, after | sparsity | time | one-shot | teacher | steps | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in runs.items():
        gap = "" if paper is None else f"{ratio(entry, paper, dense):.3f}"
        phases = entry["phases"]
        lines.append(
            f"| {name} | {entry['perplexity']:.2f} | {gap} | {entry['curve'][0][1]:.2f} "
            f"| {entry['validation']:.2f} | {entry['sparsity']:.4f} | {entry['seconds']:.0f} s "
            + "".join(f"| {phases.get(p, 0):.0f} s " for p in ("one-shot", "teacher", "steps"))
            + f"| {entry['peak_bytes'] / 1e9:.2f} GB |"
        )
    lines += ["", "| tokens | " + " | ".join(runs) + " |", "|---:|" + "---:|" * len(runs)]
    curves = {name: dict(entry["curve"]) for name, entry in runs.items()}
    for tokens in sorted({at for curve in curves.values() for at in curve}):
        cells = [f"{curve[tokens]:.2f}" if tokens in curve else "" for curve in curves.values()]
        lines.append(f"| {tokens:,.0f} | " + " | ".join(cells) + " |")
    return lines


def ratio(entry: Json, paper: Json, dense: float) -> float:
    return float((entry["perplexity"] - dense) / (paper["perplexity"] - dense))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="file or folder to train on")
    parser.add_argument("--validation", type=Path, required=True, help="text of the curve")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument(
        "--contenders", default="ast,default", help="comma-separated; NAME=PRESET[:FILE.yaml]"
    )
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--max-windows", type=int, default=40)
    windows.add_argument("--full", action="store_true", help="evaluate on the whole text")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument(
        "--work", type=made_folder, help="folder for temporary checkpoints and logs"
    )
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Json:
    """All that a result depends on, our code and the contenders' options aside."""
    names = "pattern tokens length batch_tokens seed window max_windows full".split()
    data = arguments.data
    files = [f for f in data.rglob("*") if f.is_file()] if data.is_dir() else [data]
    return {
        **{name: getattr(arguments, name) for name in names},
        "model": digest_of(arguments.model.glob("*.safetensors")),
        "data": digest_of(files),
        "validation": arguments.validation.name,
        "text": arguments.text.name,
        "machine": describe_machine(),
    }


def protocol_lines(settings: Json) -> list[str]:
    """Return the protocol and the machine in sentences."""
    s = settings
    windows = "all windows" if s["full"] else f"first {s['max_windows']} windows"
    return [
        f"Pattern {s['pattern']}; {s['tokens']:,} tokens in windows of {s['length']}, steps of "
        f"{s['batch_tokens']}, seed {s['seed']}. Perplexity: {s['text']}, {windows} of "
        f"{s['window']} tokens, bf16 autocast; validation: windows of {s['validation']}. Time and "
        "peak resident size of the whole process.",
        machine_line(s["machine"]),
    ]


def main() -> None:
    """Read the command line, run what is missing, print the tables."""
    arguments = parse_arguments()
    # As an exception, so that the running contender and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    contenders = [Contender.parse(text) for text in arguments.contenders.split(",")]
    results = Results(arguments.output, settings_of(arguments))
    windows = None if arguments.full else arguments.max_windows

    def measure_dense() -> Json:
        return {
            "perplexity": perplexity(arguments.model, arguments.text, arguments.window, windows)
        }

    dense = results.dense(measure_dense)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work) as work:
        for contender in contenders:
            if not results.runs("training", contender):
                print(contender.name, file=sys.stderr, flush=True)
                results.add("runs", run(arguments, contender, Path(work)))
    runs = {each.label: results.runs("training", each)[-1] for each in contenders}
    lines = table(runs, dense["perplexity"])
    lines += ["", *protocol_lines(results.settings), f"Commit: {results.commit}."]
    publish(lines, arguments.markdown)


if __name__ == "__main__":
    main()
