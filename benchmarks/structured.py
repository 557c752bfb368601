"""Shrink one model in several ways, in one run and on the same text.

    python benchmarks/structured.py --model DIR --calibration c4.jsonl \\
        --text wikitext2_test.txt --output results.json --markdown table.md

Every contender is a whole process from a model on disk to a smaller one on disk, uneven widths
where it chooses them: `default` and `uniform` of `secateur shrink`, its `paper` preset, and the
baselines `wanda-sp` and `flap`; `+recover` has `secateur recover` behind it. Results are written as
they come, and a run that is already in the output file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.measuring import Json, describe_machine, digest_of, made_folder, measure, perplexity
from harness.results import Results
from harness.table import machine_line, publish
from secateur.runs.processes import apart

BASELINES = Path(__file__).with_name("structured_baselines.py")
PRESETS = {
    "default": ["--preset", "default"],
    "uniform": ["--preset", "default", "--uniform"],
    "paper": ["--preset", "paper"],
}
METHODS = ("paper", "wanda-sp", "flap", "uniform", "default")
CONTENDERS = ",".join(
    f"{method}-{percent}"
    for percent in (20, 30, 50)
    for method in ("paper", "wanda-sp", "flap", "uniform", "default", "default+recover")
)
TOLERANCE = 0.005
TOOL = "structured"
BLOCK_TENSOR = re.compile(r"\.(?:layers|h|blocks)\.\d+\.")


@dataclass(frozen=True)
class Contender:
    """A way to shrink, the share of the blocks' parameters to remove, and what follows.

    Written ``METHOD[+recover]-PERCENT``; ``paper@32x4`` is the paper's preset with 32 masks on 4
    windows in each round instead of its own numbers.
    """

    name: str
    method: str
    masks: str | None
    windows: str | None
    recovered: bool
    percent: int

    @classmethod
    def parse(cls, name: str) -> Contender:
        """Read a contender's name.

        Raises:
            SystemExit: it has another form.
        """
        methods = "|".join(METHODS)
        match = re.fullmatch(rf"({methods})(?:(?<=paper)@(\d+)x(\d+))?(\+recover)?-(\d+)", name)
        if match is None:
            raise SystemExit(
                f"{name!r} is not a contender; write METHOD[+recover]-PERCENT, such as "
                f"default+recover-30, METHOD one of {', '.join(METHODS)}, or paper@MASKSxWINDOWS."
            )
        method, masks, windows, recovered, percent = match.groups()
        return cls(name, method, masks, windows, recovered is not None, int(percent))

    @property
    def label(self) -> str:
        """Method as shown in the table."""
        method = self.method
        if self.masks:
            method += f", {self.masks} masks on {self.windows} windows"
        return method + " + recover" * self.recovered

    def place(self) -> tuple[int, int, bool]:
        """Where it stands in the table."""
        return self.percent, METHODS.index(self.method), self.recovered


def shrinking(arguments: argparse.Namespace, contender: Contender, output: Path) -> list[str]:
    """Return the command line that removes parameters."""
    text = ["--sparsity", str(contender.percent / 100), "--calibration", str(arguments.calibration)]
    text += ["--length", str(arguments.length), "--seed", str(arguments.seed)]
    samples = ["--samples", str(arguments.samples)]
    if contender.method not in PRESETS:
        model = [contender.method, str(arguments.model), str(output)]
        return [sys.executable, str(BASELINES), *model, *text, *samples]
    flags = [*PRESETS[contender.method], "--output", str(output), *text]
    if contender.masks and contender.windows:
        flags += ["--samples", contender.windows, "--masks", contender.masks]
    elif contender.method != "paper":
        flags += [*samples, "--sub-models", str(arguments.sub_models)]
    return [sys.executable, "-m", "secateur", "shrink", str(arguments.model), *flags]


def recovering(arguments: argparse.Namespace, small: Path, output: Path) -> list[str]:
    """Return the command line that recovers what was cut."""
    flags = ["--teacher", str(arguments.model), "--output", str(output), "--trust-remote-code"]
    flags += [flag for data in arguments.data for flag in ("--data", str(data))]
    flags += ["--tokens", str(arguments.tokens), "--length", str(arguments.length)]
    flags += ["--seed", str(arguments.seed)]
    return [sys.executable, "-m", "secateur", "recover", str(small), *flags]


def count_parameters(dense: Path, small: Path) -> list[int]:
    """Parameters in the blocks of two checkpoints, of tensors that the dense one has."""
    from safetensors import safe_open

    sizes: list[dict[str, int]] = []
    for folder in (dense, small):
        sizes.append({})
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in filter(BLOCK_TENSOR.search, tensors.keys()):
                    sizes[-1][name] = math.prod(tensors.get_slice(name).get_shape())
    return [sum(size for name, size in each.items() if name in sizes[0]) for each in sizes]


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
    """Run a contender once; measure, count and evaluate what it has saved."""
    output, recovered = work / "small", work / "recovered"
    for folder in (output, recovered):
        shutil.rmtree(folder, ignore_errors=True)
    steps = [measure(shrinking(arguments, contender, output), work / f"{contender.name}.log")]
    forward_tokens = json.loads((output / "report.json").read_text())["forward_tokens"]
    trained_tokens = 0
    if contender.recovered:
        command = recovering(arguments, output, recovered)
        steps.append(measure(command, work / f"{contender.name}.log"))
        shutil.rmtree(output)
        output = recovered
        trained_tokens = json.loads((output / "report.json").read_text())["network"]["tokens"]
    before, after = apart(count_parameters, arguments.model, output)
    removed = 1 - after / before
    windows = None if arguments.full else arguments.max_windows
    entry = {
        "tool": TOOL,
        "contender": contender.name,
        "seconds": sum(step.seconds for step in steps),
        "cpu_seconds": sum(step.cpu_seconds for step in steps),
        "peak_bytes": max(step.peak_bytes for step in steps),
        "parameters": after,
        "removed": removed,
        "refused": None
        if abs(removed - contender.percent / 100) <= arguments.tolerance
        else f"{removed:.4f} of the parameters removed",
        "forward_tokens": forward_tokens,
        "trained_tokens": trained_tokens,
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


def table(
    runs: dict[str, Json],
    contenders: list[Contender],
    dense: float,
    here: Callable[[Json], bool],
) -> list[str]:
    """Return the Markdown table; the paper's preset at the same size is what others are held to.

    Args:
        runs: by contender.
        contenders: whose runs they are.
        dense: perplexity of the dense model.
        here: whether a run was measured on this machine, so that its time can be compared.
    """
    lines = [
        f"| method | target | removed | parameters in blocks | perplexity (dense {dense:.2f}) "
        "| gap / paper's | forward tokens | / paper's | trained on | time | / paper's "
        "| peak memory | prefill of blocks, tokens/s | speed-up / parameters | decode, tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for contender in sorted(contenders, key=Contender.place):
        entry = runs[contender.name]
        if entry["refused"]:
            continue
        paper = yardstick(runs, contender.percent)
        timed = paper if here(entry) and paper and here(paper) else None
        prefill, decode = entry["speeds"]["prefill"], entry["speeds"]["decode"]
        cells = [
            contender.label,
            f"{contender.percent}%",
            f"{entry['removed']:.4f}",
            f"{entry['parameters'] / 1e6:.2f} M",
            f"{entry['perplexity']:.2f}",
            ratio(entry["perplexity"] - dense, paper and paper["perplexity"] - dense),
            f"{entry['forward_tokens'] / 1e6:.2f} M",
            ratio(entry["forward_tokens"], paper and paper["forward_tokens"]),
            f"{entry['trained_tokens'] / 1e6:.2f} M" if entry["trained_tokens"] else "",
            f"{entry['seconds']:.0f} s" if here(entry) else "",
            ratio(entry["seconds"], timed and timed["seconds"]),
            f"{entry['peak_bytes'] / 1e9:.2f} GB",
            faster(prefill),
            f"{prefill[1] / prefill[0] * (1 - entry['removed']):.2f}",
            faster(decode),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def yardstick(runs: dict[str, Json], percent: int) -> Json | None:
    """The paper's preset at this size, with most forward tokens if it ran with several numbers."""
    papers = [
        run
        for name, run in runs.items()
        if (contender := Contender.parse(name)).method == "paper"
        and contender.percent == percent
        and not contender.recovered
    ]
    return max(papers, key=lambda run: run["forward_tokens"], default=None)


def faster(speeds: list[float]) -> str:
    """Tokens per second of the dense and of the smaller model, and their ratio."""
    dense, small = speeds
    return f"{dense:.0f} to {small:.0f} ({small / dense:.2f}×)"


def ratio(value: float, yardstick: float | None) -> str:
    return f"{value / yardstick:.3f}" if yardstick else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts, or txt")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], help="text to recover with; repeatable"
    )
    parser.add_argument(
        "--contenders",
        default=CONTENDERS,
        help="comma-separated METHOD[+recover]-PERCENT to run now; the table shows all there are",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="keep earlier results although the project's code has changed",
    )
    parser.add_argument(
        "--any-machine",
        action="store_true",
        help="keep earlier results of other machines too; the table has no times of those",
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--sub-models", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=262_144, help="to recover with")
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
    parser.add_argument(
        "--work", type=made_folder, help="folder for temporary checkpoints and logs"
    )
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Json:
    """All that a result depends on, our code aside."""
    names = (
        "samples sub_models tokens length seed window max_windows full prefill "
        "new_tokens speed_repeats tolerance"
    ).split()
    return {
        **{name: getattr(arguments, name) for name in names},
        "model": digest_of(arguments.model.glob("*.safetensors")),
        "calibration": arguments.calibration.name,
        "text": arguments.text.name,
        "data": [data.name for data in arguments.data],
        "baselines": digest_of([BASELINES]),
        "machine": describe_machine(),
    }


def protocol_lines(settings: Json) -> list[str]:
    """Return the protocol and the machine in sentences."""
    s = settings
    windows = "all windows" if s["full"] else f"first {s['max_windows']} windows"
    return [
        f"Calibration: {s['calibration']}, {s['samples']} windows of {s['length']} tokens, paper's "
        f"of each round; seed {s['seed']}. "
        f"Recovery: {', '.join(s['data']) or 'none'}. "
        f"Perplexity: {s['text']}, {windows} of {s['window']} tokens, bf16 autocast. Time and "
        "peak resident size of whole processes. Prefill and decode: tokens per second of the "
        f"dense model and of the smaller one, both in turn, bf16, median of {s['speed_repeats']}; "
        f"{s['prefill']} tokens through the blocks, {s['new_tokens']} tokens by the whole model. "
        "Speed-up / parameters: of prefill, over what the parameters alone would give.",
        machine_line(s["machine"]),
    ]


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    arguments = parse_arguments()
    # As an exception, so that the running contender and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked = [Contender.parse(name) for name in arguments.contenders.split(",")]
    if any(each.recovered for each in asked) and not arguments.data:
        raise SystemExit("Recovery needs text; name it with --data.")
    settings = settings_of(arguments)
    results = Results(
        arguments.output,
        settings,
        {TOOL} if arguments.reuse else set(),
        any_machine=arguments.any_machine,
    )
    windows = None if arguments.full else arguments.max_windows

    def measure_dense() -> Json:
        return {
            "perplexity": perplexity(arguments.model, arguments.text, arguments.window, windows)
        }

    dense = results.dense(measure_dense)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work) as work:
        for contender in asked:
            if not results.runs(TOOL, contender):
                print(contender.name, file=sys.stderr, flush=True)
                results.add("runs", run(arguments, contender, Path(work)))
    names = [each["contender"] for each in results.content["runs"] if each["tool"] == TOOL]
    known = {name: Contender.parse(name) for name in names}
    runs = {name: found[-1] for name, each in known.items() if (found := results.runs(TOOL, each))}
    notes = [f"Not shown: {name}, {e['refused']}." for name, e in runs.items() if e["refused"]]
    lines = table(
        runs, [known[name] for name in runs], dense["perplexity"], results.is_of_this_machine
    )
    commits = sorted({run["commit"] for run in runs.values()})
    lines += ["", *protocol_lines(results.settings), f"Commit: {', '.join(commits)}.", *notes]
    publish(lines, arguments.markdown)


if __name__ == "__main__":
    main()
