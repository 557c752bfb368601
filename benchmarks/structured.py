"""Shrink one model in several ways, in one run and on the same text.

    python benchmarks/structured.py --model DIR --calibration c4.jsonl \\
        --text wikitext2_test.txt --output results.json --markdown table.md

Every contender is a whole process from a model on disk to a smaller one on disk, uneven widths
where it chooses them: `default` and `uniform` of `secateur shrink`, its `paper` preset, and the
baselines `wanda-sp` and `flap`. Results are written as they come, and a run that is already in the
output file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.measuring import Json, describe_machine, digest_of, measure, perplexity
from harness.results import Results
from secateur.processes import apart

BASELINES = Path(__file__).with_name("structured_baselines.py")
PRESETS = {
    "default": ["--preset", "default"],
    "uniform": ["--preset", "default", "--uniform"],
    "paper": ["--preset", "paper"],
}
METHODS = ("paper", "wanda-sp", "flap", "uniform", "default")
TOLERANCE = 0.005


@dataclass(frozen=True)
class Contender:
    """A way to shrink, and the share of the blocks' parameters to remove in percent."""

    method: str
    percent: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.percent}"


def command(arguments: argparse.Namespace, contender: Contender, output: Path) -> list[str]:
    """Return the command line of a contender."""
    text = ["--sparsity", str(contender.percent / 100), "--calibration", str(arguments.calibration)]
    text += ["--length", str(arguments.length), "--seed", str(arguments.seed)]
    samples = ["--samples", str(arguments.samples)]
    if contender.method not in PRESETS:
        model = [contender.method, str(arguments.model), str(output)]
        return [sys.executable, str(BASELINES), *model, *text, *samples]
    flags = [*PRESETS[contender.method], "--output", str(output), *text]
    if contender.method == "paper":
        flags += ["--samples", str(arguments.round_samples), "--masks", str(arguments.masks)]
    else:
        flags += [*samples, "--sub-models", str(arguments.sub_models)]
    return [sys.executable, "-m", "secateur", "shrink", str(arguments.model), *flags]


def speeds(dense: Path, small: Path, length: int, repeats: int, new_tokens: int) -> Json:
    """Tokens per second of both models, measured in turn: prefill of the blocks, and decoding."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, trust_remote_code=trusted
        ).eval()
        for folder, trusted in ((dense, False), (small, True))
    ]
    ids = torch.arange(length).unsqueeze(0) % models[0].config.get_text_config().vocab_size

    @torch.no_grad()
    def prefill(model: torch.nn.Module) -> float:
        started = time.perf_counter()
        # Without the head, which is as large as it was.
        model.base_model(input_ids=ids, use_cache=False)
        return length / (time.perf_counter() - started)

    @torch.no_grad()
    def decode(model: torch.nn.Module) -> float:
        started = time.perf_counter()
        model.generate(
            ids[:, :8],
            attention_mask=torch.ones_like(ids[:, :8]),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        return new_tokens / (time.perf_counter() - started)

    found: Json = {}
    for label, run in (("prefill", prefill), ("decode", decode)):
        for model in models:
            run(model)
        pairs = [[run(model) for model in models] for _ in range(repeats)]
        found[label] = [statistics.median(each) for each in zip(*pairs, strict=True)]
    return found


def run(arguments: argparse.Namespace, contender: Contender, work: Path) -> Json:
    """Run a contender once; measure and evaluate what it has saved."""
    output = work / "small"
    shutil.rmtree(output, ignore_errors=True)
    measured = measure(command(arguments, contender, output), work / f"{contender.name}.log")
    report = json.loads((output / "report.json").read_text())
    removed = report["parameters"]["removed"]
    windows = None if arguments.full else arguments.max_windows
    entry = {
        "tool": "structured",
        "contender": contender.name,
        **asdict(measured),
        "inner_seconds": report["seconds"]["total"],
        "removed": removed,
        "refused": None
        if abs(removed - contender.percent / 100) <= arguments.tolerance
        else f"{removed:.4f} of the parameters removed",
        "forward_tokens": report["forward_tokens"],
        "perplexity": perplexity(
            output, arguments.text, arguments.window, windows, trust_remote_code=True
        ),
        "speeds": apart(
            speeds,
            arguments.model,
            output,
            arguments.prefill,
            arguments.speed_repeats,
            arguments.new_tokens,
        ),
    }
    shutil.rmtree(output)
    return entry


def table(runs: dict[str, Json], contenders: list[Contender], dense: float) -> list[str]:
    """Return the Markdown table; the paper's preset at the same size is what others are held to."""
    lines = [
        f"| method | target | removed | perplexity (dense {dense:.2f}) | gap / paper's "
        "| forward tokens | / paper's | time | / paper's | prefill of blocks | / parameters "
        "| decode | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for contender in sorted(contenders, key=lambda each: each.percent):
        entry = runs.get(contender.name)
        if entry is None or entry["refused"]:
            continue
        paper = runs.get(Contender("paper", contender.percent).name)
        prefill, decode = (
            each[1] / each[0] for each in (entry["speeds"]["prefill"], entry["speeds"]["decode"])
        )
        cells = [
            contender.method,
            f"{contender.percent}%",
            f"{entry['removed']:.4f}",
            f"{entry['perplexity']:.2f}",
            ratio(entry["perplexity"] - dense, paper and paper["perplexity"] - dense),
            f"{entry['forward_tokens'] / 1e6:.2f} M",
            ratio(entry["forward_tokens"], paper and paper["forward_tokens"]),
            f"{entry['seconds']:.0f} s",
            ratio(entry["seconds"], paper and paper["seconds"]),
            f"{prefill:.2f}",
            f"{prefill * (1 - entry['removed']):.2f}",
            f"{decode:.2f}",
            f"{entry['peak_bytes'] / 1e9:.2f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ratio(value: float, yardstick: float | None) -> str:
    return f"{value / yardstick:.3f}" if yardstick else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts, or txt")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--percents", default="20,30,50", help="shares to remove")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--round-samples", type=int, default=32, help="of each round of paper")
    parser.add_argument("--masks", type=int, default=200, help="of each round of paper")
    parser.add_argument("--sub-models", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--max-windows", type=int, default=40)
    windows.add_argument("--full", action="store_true", help="evaluate on the whole text")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of a decoding")
    parser.add_argument("--speed-repeats", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of what is removed")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--work", type=Path, help="folder for temporary checkpoints and logs")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Json:
    """All that a result depends on, our code aside."""
    names = (
        "samples round_samples masks sub_models length seed window max_windows full prefill "
        "new_tokens speed_repeats tolerance"
    ).split()
    return {
        **{name: getattr(arguments, name) for name in names},
        "model": digest_of(arguments.model.glob("*.safetensors")),
        "calibration": arguments.calibration.name,
        "text": arguments.text.name,
        "baselines": digest_of([BASELINES]),
        "machine": describe_machine(),
    }


def protocol_lines(settings: Json) -> list[str]:
    """Return the protocol and the machine in sentences."""
    s, machine = settings, settings["machine"]
    windows = "all windows" if s["full"] else f"first {s['max_windows']} windows"
    return [
        f"Calibration: {s['calibration']}, {s['samples']} windows of {s['length']} tokens; paper: "
        f"{s['masks']} masks on {s['round_samples']} windows in each round; seed {s['seed']}. "
        f"Perplexity: {s['text']}, {windows} of {s['window']} tokens, bf16 autocast. Time and "
        "peak resident size of the whole process. Prefill and decode: tokens per second over "
        f"those of the dense model, both in turn, bf16, median of {s['speed_repeats']}; "
        f"{s['prefill']} tokens through the blocks, {s['new_tokens']} tokens by the whole model. "
        "/ parameters: prefill speed-up over that of the parameters in the blocks.",
        f"Machine: {machine['cores']} cores, {machine['processor']}, "
        f"{'AMX' if machine['amx'] else 'no AMX'}, torch {machine['torch']}.",
    ]


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    arguments = parse_arguments()
    # As an exception, so that the running contender and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    percents = [int(percent) for percent in arguments.percents.split(",")]
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"{', '.join(sorted(unknown))} is none of {', '.join(METHODS)}.")
    contenders = [Contender(method, percent) for percent in percents for method in methods]
    results = Results(arguments.output, settings_of(arguments), reuse_peer=False)
    if (dense := results.dense()) is None:
        windows = None if arguments.full else arguments.max_windows
        value = perplexity(arguments.model, arguments.text, arguments.window, windows)
        dense = {"perplexity": value}
        results.add("dense", dense)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work) as work:
        for contender in contenders:
            if not results.runs("structured", contender):
                print(contender.name, file=sys.stderr, flush=True)
                results.add("runs", run(arguments, contender, Path(work)))
    everything = [
        Contender(method, percent)
        for percent in sorted({*percents})
        for method in METHODS
        if results.runs("structured", Contender(method, percent))
    ]
    runs = {each.name: results.runs("structured", each)[-1] for each in everything}
    notes = [f"Not shown: {name}, {e['refused']}." for name, e in runs.items() if e["refused"]]
    lines = table(runs, everything, dense["perplexity"])
    lines += ["", *protocol_lines(results.settings), f"Commit: {results.commit}.", *notes]
    lines.append(f"Command: `{shlex.join(['python', *sys.argv])}`.")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
