"""Prune one model with secateur and with llm-compressor, in one run, on the same tokens.

    python benchmarks/one_shot.py --model DIR --calibration c4.jsonl --text wikitext2_test.txt \\
        --peer-env .venv-peers --output results.json --markdown table.md

Every contender is a whole process from a model on disk to a pruned model on disk. Results are
written as they come, and a run that is already in the output file is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

# Neither torch nor numpy is imported here: a child's peak resident size starts at that of the
# process that forked it, so this process has to stay small. Work that needs them is `apart`.

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
REQUIREMENTS = HERE / "requirements-peers.txt"
PEER_SCRIPT = HERE / "peers" / "llm_compressor.py"
OURS, PEER = "secateur", "llm-compressor"
PEER_METHODS = ("sparsegpt", "wanda")
DEFAULT_CONTENDERS = (
    "sparsegpt-50,wanda-50,wanda+refit-50,admm-50,sparsegpt-2:4,wanda-2:4,wanda+refit-2:4,admm-2:4"
)
SPARSITY_TOLERANCE = 0.0005
BLOCK_LINEAR = re.compile(r"\.(?:layers|h|blocks)\.\d+\..*weight$")

P = ParamSpec("P")
T = TypeVar("T")
Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A method and a pattern, written ``METHOD[+refit]-PERCENT`` or ``METHOD[+refit]-n:m``."""

    name: str
    method: str
    refit: bool
    pattern: str | None
    sparsity: float

    @classmethod
    def parse(cls, name: str) -> Contender:
        """Read a contender's name.

        Raises:
            SystemExit: it has another form.
        """
        match = re.fullmatch(r"(\w+)(\+refit)?-(?:(\d+(?:\.\d+)?)|(\d+):(\d+))", name)
        if match is None:
            raise SystemExit(
                f"{name!r} is not a contender; write METHOD[+refit]-PATTERN, such as "
                "sparsegpt-50 or wanda+refit-2:4."
            )
        method, refit, percent, kept, group = match.groups()
        return cls(
            name=name,
            method=method,
            refit=refit is not None,
            pattern=None if percent else f"{kept}:{group}",
            sparsity=float(percent) / 100 if percent else 1 - int(kept) / int(group),
        )

    @property
    def flags(self) -> list[str]:
        """Options that both tools' commands understand."""
        target = ["--pattern", self.pattern] if self.pattern else ["--sparsity", str(self.sparsity)]
        return ["--method", self.method, *target]

    @property
    def tools(self) -> tuple[str, ...]:
        """Who can do this, in the order in which they run."""
        return (PEER, OURS) if self.method in PEER_METHODS and not self.refit else (OURS,)

    @property
    def method_label(self) -> str:
        """Method as shown in the table."""
        return f"{self.method} + refit" if self.refit else self.method

    @property
    def pattern_label(self) -> str:
        """Pattern as shown in the table."""
        return self.pattern or f"{100 * self.sparsity:g}%"


@dataclass(frozen=True)
class Measured:
    """What a process cost, seen from outside.

    Attributes:
        seconds: wall time from start to exit.
        cpu_seconds: user and system time; far below cores x seconds if others used the machine.
        peak_bytes: largest resident size.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Count:
    """Zeros of the linears in the blocks of a saved checkpoint.

    Attributes:
        zeros: counted in the files.
        weights: all weights of those linears.
        violations: groups of m consecutive columns that keep more than n; 0 without a pattern.
    """

    zeros: int
    weights: int
    violations: int

    @property
    def sparsity(self) -> float:
        """Zeros over weights."""
        return self.zeros / self.weights


def measure(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end, its output in ``log``, and measure it.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    os.sync()  # what the run before wrote is not this one's work
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=child_environment()
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{tail}\n{shlex.join(command)} ended with {process.returncode}.")
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def child_environment() -> dict[str, str]:
    """Return the environment of every contender: the same threads, no look-ups on the hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process, so that this one imports nothing large."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args, **kwargs).result()


def write_tokens(
    model: Path, calibration: Path, samples: int, length: int, seed: int, file: Path
) -> str:
    """Write the calibration token ids that every contender sees; return their digest."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from secateur.calibration import CalibrationOptions, load_calibration

    options = CalibrationOptions(source=str(calibration), samples=samples, length=length, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens_SL = load_calibration(options, tokenizer).tokens.long()
    if tokens_SL.shape != (samples, length):
        raise SystemExit(f"The calibration text gave {tuple(tokens_SL.shape)} tokens.")
    save_file({"input_ids": tokens_SL.contiguous()}, file)
    return hashlib.sha256(tokens_SL.numpy().tobytes()).hexdigest()[:16]


def same_tokens(used: Path, shared: Path) -> bool:
    """Tell whether the tokens a run of ours kept are those of the shared file."""
    import torch
    from safetensors.torch import load_file

    return torch.equal(load_file(used)["tokens"].long(), load_file(shared)["input_ids"])


def count_zeros(folder: Path, pattern: str | None) -> Count:
    """Count zeros in the files of a checkpoint whose linears are stored as (out, in)."""
    from safetensors import safe_open

    kept, group = (int(part) for part in pattern.split(":")) if pattern else (1, 1)
    zeros = weights = violations = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if not BLOCK_LINEAR.search(name) or len(tensors.get_slice(name).get_shape()) != 2:
                    continue
                kept_OI = tensors.get_tensor(name) != 0
                weights += kept_OI.numel()
                zeros += kept_OI.numel() - int(kept_OI.sum())
                violations += int((kept_OI.reshape(-1, group).sum(1) > kept).sum())
    return Count(zeros, weights, violations)


def perplexity(folder: Path, text: Path, window: int, windows: int | None) -> float:
    """Evaluate a checkpoint with ``secateur eval``, whichever tool has saved it."""
    command = [sys.executable, "-m", "secateur", "eval", str(folder), "--text", str(text)]
    command += ["--window", str(window), "--dtype", "bfloat16", "--json"]
    command += ["--max-windows", str(windows)] if windows else []
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-3000:]}\n{shlex.join(command)} failed.")
    return float(json.loads(done.stdout)["model"]["perplexity"])


def peer_python(environment: Path) -> Path:
    """Return the interpreter of the contender's environment, made first if it is absent."""
    python = environment / "bin" / "python"
    if not python.is_file():
        print(f"Making the contender's environment in {environment}", file=sys.stderr)
        venv.create(environment, with_pip=True)
        torch = f"torch=={pinned_versions()['torch']}"
        for what in ([torch], ["--requirement", str(REQUIREMENTS)]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)
    return python


def pinned_versions() -> dict[str, str]:
    """Return the versions that the contender's environment must have."""
    lines = REQUIREMENTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def check_versions(python: Path) -> None:
    """Check that an environment is the pinned one.

    Raises:
        SystemExit: a package is missing or has another version.
    """
    pins = pinned_versions()
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: m.version(n).partition('+')[0] for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *pins], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}{python} lacks what {REQUIREMENTS.name} lists.")
    for name, version in json.loads(done.stdout).items():
        if version != pins[name]:
            raise SystemExit(f"{python} has {name} {version}, the bench wants {pins[name]}.")


def describe_machine() -> Json:
    """Describe the machine that times are valid for."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", facts, re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "processor": model[1] if model else os.uname().machine,
        "amx": "amx_tile" in facts,
        "torch": importlib.metadata.version("torch"),
    }


def digest_of(files: Iterable[Path]) -> str:
    """Hash the contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def commit() -> str:
    """Return the commit that is checked out and whether the package differs from it."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "no commit"
    state = subprocess.run(
        [*git, "status", "--porcelain", "--", "src"], capture_output=True, text=True
    )
    return head.stdout.strip() + (" with changes" if state.stdout.strip() else "")


class Results:
    """The output file: every run ever made, and which of them count for these settings."""

    def __init__(self, file: Path, settings: Json, reuse_peer: bool):
        self.file = file
        self.settings = settings
        self.code = digest_of((REPOSITORY / "src").rglob("*.py"))
        self.commit = commit()
        self.reuse_peer = reuse_peer
        self.content: dict[str, list[Json]] = {"dense": [], "runs": []}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def dense(self) -> Json | None:
        """Return the dense model's entry, if it was evaluated under these settings."""
        matching = [e for e in self.content["dense"] if e["settings"] == self.settings]
        return matching[-1] if matching else None

    def runs(self, tool: str, contender: Contender) -> list[Json]:
        """Return the runs made under these settings by the code that is here now."""
        return [
            run
            for run in self.content["runs"]
            if (run["tool"], run["contender"]) == (tool, contender.name)
            and run["settings"] == self.settings
            and (run["code"] == self.code or (tool == PEER and self.reuse_peer))
        ]

    def add(self, kind: str, entry: Json) -> None:
        """Add an entry and write the file."""
        origin = {"commit": self.commit, "code": self.code, "settings": self.settings}
        self.content[kind].append(entry | origin)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


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
            command = [str(self.peer), str(PEER_SCRIPT), str(self.model), *contender.flags]
            command += ["--tokens", str(self.tokens), "--batch-size", str(self.peer_batch_size)]
            return [*command, "--timing", str(self.work / "timing.json"), "--output", str(output)]
        command = [sys.executable, "-m", "secateur", "prune", str(self.model), *contender.flags]
        command += ["--refit" if contender.refit else "--no-refit"]
        command += ["--calibration", str(self.calibration), "--samples", str(self.samples)]
        command += ["--length", str(self.length), "--seed", str(self.seed)]
        return [*command, "--output", str(output)]

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


def table(results: Results, contenders: Sequence[Contender], dense: float) -> list[str]:
    """Return the Markdown table of the best run of each contender, and notes below it."""
    best: dict[tuple[str, str], Json] = {}
    notes: list[str] = []
    for contender in contenders:
        for tool in contender.tools:
            runs = results.runs(tool, contender)
            if refused := next((run["refused"] for run in runs if run["refused"]), None):
                notes.append(f"Not shown: {tool} {contender.name}, {refused}.")
            elif runs:
                best[tool, contender.name] = min(runs, key=lambda run: run["seconds"])

    lines = [
        "| tool | method | pattern | counted sparsity "
        f"| perplexity (dense {dense:.2f}) | time | without start-up "
        f"| time / {PEER}, same method | time / {PEER} SparseGPT | peak memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for contender in sorted(contenders, key=lambda c: (c.pattern or "", c.sparsity)):
        yardsticks = [
            None if contender.refit else best.get((PEER, contender.name)),
            best.get((PEER, f"sparsegpt-{contender.name.rpartition('-')[2]}")),
        ]
        lines += [
            row(tool, contender, best[tool, contender.name], yardsticks)
            for tool in contender.tools
            if (tool, contender.name) in best
        ]
    commits = sorted({run["commit"] for run in best.values()})
    return [*lines, "", *protocol_lines(results.settings), f"Commit: {', '.join(commits)}.", *notes]


def row(tool: str, contender: Contender, run: Json, yardsticks: Sequence[Json | None]) -> str:
    """Return one line of the table; ``yardsticks`` are the runs that ours is divided by."""
    cells = [
        tool,
        contender.method_label,
        contender.pattern_label,
        f"{run['sparsity']:.4f}",
        f"{run['perplexity']:.2f}",
        f"{run['seconds']:.0f} s",
        f"{run['inner_seconds']:.0f} s",
        *(
            f"{run['seconds'] / peer['seconds']:.2f}" if peer and tool == OURS else ""
            for peer in yardsticks
        ),
        f"{run['peak_bytes'] / 1e9:.2f} GB",
    ]
    return "| " + " | ".join(cells) + " |"


def protocol_lines(settings: Json) -> list[str]:
    """Return the protocol and the machine in sentences."""
    s, machine, peer = settings, settings["machine"], settings["peer"]
    windows = f"first {s['windows']} windows" if s["windows"] else "all windows"
    return [
        f"Calibration: {s['calibration']}, {s['samples']} windows of {s['length']} tokens, seed "
        f"{s['seed']}. Perplexity: {s['text']}, {windows} of {s['window']} tokens, bf16 autocast. "
        "Time and peak resident size of the whole process, the fastest run of each.",
        f"Machine: {machine['cores']} cores, {machine['processor']}, "
        f"{'AMX' if machine['amx'] else 'no AMX'}, torch {machine['torch']}. "
        f"{PEER} {peer['llmcompressor']}, batches of {peer['batch size']}.",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--contenders", default=DEFAULT_CONTENDERS, help="comma-separated")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--only",
        default="",
        help="comma-separated parts of TOOL/CONTENDER names to run now, such as secateur/wanda",
    )
    parser.add_argument("--peer-env", type=Path, default=REPOSITORY / ".venv-peers")
    parser.add_argument("--peer-python", type=Path, help="an interpreter to use as it is")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="its default is 1")
    parser.add_argument(
        "--reuse-peer",
        action="store_true",
        help="keep the peer's results when only the project's code has changed",
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--max-windows", type=int, default=40)
    windows.add_argument("--full", action="store_true", help="evaluate on the whole text")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--work", type=Path, help="folder for temporary checkpoints and logs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # As an exception, so that the running contender and its folder go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="one-shot-", dir=arguments.work) as work:
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
    peer = arguments.peer_python
    if any(tool == PEER for tool, _, _ in plan):
        peer = peer or peer_python(arguments.peer_env)
        check_versions(peer)
    bench = Bench(
        model=arguments.model,
        calibration=arguments.calibration,
        tokens=work / "tokens.safetensors",
        text=arguments.text,
        samples=arguments.samples,
        length=arguments.length,
        seed=arguments.seed,
        window=arguments.window,
        windows=None if arguments.full else arguments.max_windows,
        peer=peer,
        peer_batch_size=arguments.peer_batch_size,
        work=work,
    )
    results = Results(arguments.output, bench.settings(), arguments.reuse_peer)
    dense = results.dense()
    if dense is None:
        weights = apart(count_zeros, bench.model, None).weights
        dense = {"perplexity": bench.evaluate(bench.model), "weights": weights}
        results.add("dense", dense)

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

    command = f"Command: `{shlex.join(['python', *sys.argv])}`."
    text = "\n".join([*table(results, contenders, dense["perplexity"]), command]) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
