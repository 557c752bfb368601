"""Measure a process from outside, and what it has saved from its files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

# Neither torch nor numpy is imported here: a child's peak resident size starts at that of the
# process that forked it, so this process has to stay small. Work that needs them is `apart`.

BLOCK_LINEAR = re.compile(r"\.(?:layers|h|blocks)\.\d+\..*weight$")

P = ParamSpec("P")
T = TypeVar("T")
Json: TypeAlias = dict[str, Any]


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


def perplexity(
    folder: Path,
    text: Path,
    window: int,
    windows: int | None,
    *,
    trust_remote_code: bool = False,
) -> float:
    """Evaluate a checkpoint with ``secateur eval``, whichever tool has saved it."""
    command = [sys.executable, "-m", "secateur", "eval", str(folder), "--text", str(text)]
    command += ["--window", str(window), "--dtype", "bfloat16", "--json"]
    command += ["--max-windows", str(windows)] if windows else []
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-3000:]}\n{shlex.join(command)} failed.")
    return float(json.loads(done.stdout)["model"]["perplexity"])


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
