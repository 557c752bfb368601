"""Run contenders one after the other and show them side by side."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.contender import OURS, PEER, Contender
from harness.measuring import (
    Count,
    Json,
    count_zeros,
    describe_machine,
    digest_of,
    made_folder,
    measure,
    perplexity,
    same_tokens,
    write_tokens,
)
from harness.peer import PEER_SCRIPT, check_versions, peer_python, pinned_versions
from harness.results import REPOSITORY, Results
from harness.table import publish, table
from secateur.runs.processes import apart

SPARSITY_TOLERANCE = 0.0005


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    model: Path
    calibration: Path
    tokens: Path
    text: Path
    samples: int
    length: int
    seed: int
    window: int
    windows: int | None
    peer: Path | None
    peer_batch_size: int
    work: Path

    @classmethod
    def of(
        cls, arguments: argparse.Namespace, work: Path, windows: int | None, *, with_peer: bool
    ) -> Bench:
        """What the command line says; the peer's environment is checked if it takes part."""
        peer = arguments.peer_python
        if with_peer:
            peer = peer or peer_python(arguments.peer_env)
            check_versions(peer)
        return cls(
            model=arguments.model,
            calibration=arguments.calibration,
            tokens=work / "tokens.safetensors",
            text=arguments.text,
            samples=arguments.samples,
            length=arguments.length,
            seed=arguments.seed,
            window=arguments.window,
            windows=windows,
            peer=peer,
            peer_batch_size=arguments.peer_batch_size,
            work=work,
        )

    def dense(self) -> Json:
        """Evaluate the dense model and count its weights."""
        weights = apart(count_zeros, self.model, None).weights
        return {"perplexity": self.evaluate(self.model), "weights": weights}

    def settings(self) -> Json:
        """Write the shared tokens; return all that a result depends on, our code aside."""
        tokens = apart(
            write_tokens,
            self.model,
            self.calibration,
            self.samples,
            self.length,
            self.seed,
            self.tokens,
        )
        return {
            "model": digest_of(self.model.glob("*.safetensors")),
            "calibration": self.calibration.name,
            "tokens": tokens,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "text": self.text.name,
            "window": self.window,
            "windows": self.windows,
            "machine": describe_machine(),
            "peer": {
                **pinned_versions(),
                "batch size": self.peer_batch_size,
                "script": digest_of([PEER_SCRIPT]),
            },
        }

    def command(self, tool: str, contender: Contender, output: Path) -> list[str]:
        """Return the command line of a contender."""
        if tool == PEER:
            return self.peer_command(contender.flags, output)
        command = [sys.executable, "-m", "secateur", "prune", str(self.model), *contender.flags]
        command += contender.own_flags
        command += ["--calibration", str(self.calibration), "--samples", str(self.samples)]
        command += ["--length", str(self.length), "--seed", str(self.seed)]
        return [*command, "--output", str(output)]

    def peer_command(self, flags: Sequence[str], output: Path) -> list[str]:
        """Return the command line of the other tool."""
        command = [str(self.peer), str(PEER_SCRIPT), str(self.model), *flags]
        command += ["--tokens", str(self.tokens), "--batch-size", str(self.peer_batch_size)]
        return [*command, "--timing", str(self.work / "timing.json"), "--output", str(output)]

    def run(self, tool: str, contender: Contender, earlier: list[Json], weights: int) -> Json:
        """Run a contender once; measure, count and evaluate what it has saved.

        Raises:
            SystemExit: it failed, or calibrated on other tokens than the shared ones.
        """
        output = self.work / "pruned"
        shutil.rmtree(output, ignore_errors=True)
        command = self.command(tool, contender, output)
        measured = measure(command, self.work / f"{tool}-{contender.name}.log")
        if tool == OURS:
            if not apart(same_tokens, output / "secateur" / "calibration.safetensors", self.tokens):
                raise SystemExit(f"secateur calibrated on other tokens than {self.tokens}.")
            phases = json.loads((output / "report.json").read_text())["seconds"]
            inner = phases["total"]
        else:
            phases = json.loads((self.work / "timing.json").read_text())
            inner = sum(phases.values())

        count = apart(count_zeros, output, contender.pattern)
        digest = digest_of(output.glob("*.safetensors"))
        known = [run for run in earlier if run["files"] == digest]
        entry = {
            "tool": tool,
            "contender": contender.name,
            **asdict(measured),
            "inner_seconds": inner,
            "phases": phases,
            "sparsity": count.sparsity,
            "refused": refusal(contender, count, weights),
            "perplexity": known[0]["perplexity"] if known else self.evaluate(output),
            "files": digest,
        }
        shutil.rmtree(output)
        return entry

    def evaluate(self, folder: Path) -> float:
        """Return the perplexity of a checkpoint under this bench's protocol."""
        return perplexity(folder, self.text, self.window, self.windows)


def refusal(contender: Contender, count: Count, weights: int) -> str | None:
    """Say why a saved checkpoint may not be shown, or None if it may."""
    if count.weights != weights:
        return f"{count.weights} weights in the linears, the dense model has {weights}"
    if abs(count.sparsity - contender.sparsity) > SPARSITY_TOLERANCE:
        return f"counted sparsity {count.sparsity:.4f}, target {contender.sparsity:.4f}"
    if count.violations:
        return f"{count.violations} groups break {contender.pattern}"
    return None


def parse_arguments(description: str, contenders: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--contenders", default=contenders, help="comma-separated")
    parser.add_argument("--repeats", type=int, default=2, help="0 shows what has been run")
    parser.add_argument(
        "--only",
        default="",
        help="comma-separated parts of TOOL/CONTENDER names to run now, such as secateur/wanda",
    )
    parser.add_argument("--peer-env", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--peer-python", type=Path, help="an interpreter to use as it is")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="its default is 1")
    add_reuse(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--max-windows", type=int, default=40)
    windows.add_argument("--full", action="store_true", help="evaluate on the whole text")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument(
        "--work", type=made_folder, help="folder for temporary checkpoints and logs"
    )
    return parser.parse_args()


def add_reuse(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``reused`` reads."""
    parser.add_argument(
        "--reuse-peer",
        action="store_true",
        help="keep the peer's results when only the project's code has changed",
    )
    parser.add_argument(
        "--any-commit",
        action="store_true",
        help="keep our results as well; the table names the commit of each row",
    )
    parser.add_argument(
        "--any-machine",
        action="store_true",
        help="keep results of other machines too; the table has no times of those",
    )


def reused(arguments: argparse.Namespace) -> set[str]:
    """Return the tools whose results count although the package has changed."""
    if arguments.any_commit:
        return {OURS, PEER}
    return {PEER} if arguments.reuse_peer else set()


def main(description: str, contenders: str) -> None:
    """Read the command line, run what is missing, print the table."""
    arguments = parse_arguments(description, contenders)
    # As an exception, so that the running contender and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work) as work:
        run_all(arguments, Path(work))


def run_all(arguments: argparse.Namespace, work: Path) -> None:
    """Run what is asked for and not yet in the output file, then print the table."""
    contenders = [Contender.parse(name) for name in arguments.contenders.split(",")]
    only = arguments.only.split(",") if arguments.only else [""]
    plan = [
        (tool, contender, repeat)
        for contender in contenders
        for repeat in range(arguments.repeats)
        for tool in contender.tools
        if any(part in f"{tool}/{contender.name}" for part in only)
    ]
    windows = None if arguments.full else arguments.max_windows
    bench = Bench.of(arguments, work, windows, with_peer=any(tool == PEER for tool, _, _ in plan))
    results = Results(
        arguments.output,
        bench.settings(),
        reused(arguments),
        any_machine=arguments.any_machine,
        only_of={"peer": PEER},
    )
    dense = results.dense(bench.dense)

    for tool, contender, repeat in plan:
        earlier = results.runs(tool, contender)
        if len(earlier) > repeat:
            continue
        print(f"{tool} {contender.name}, run {repeat + 1}", file=sys.stderr, flush=True)
        entry = bench.run(tool, contender, earlier, dense["weights"])
        results.add("runs", entry)
        print(
            f"  {entry['seconds']:.0f} s, {entry['peak_bytes'] / 1e9:.2f} GB, "
            f"sparsity {entry['sparsity']:.4f}, perplexity {entry['perplexity']:.2f}",
            file=sys.stderr,
            flush=True,
        )

    publish(table(results, contenders, dense["perplexity"]), arguments.markdown)
