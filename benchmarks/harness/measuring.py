"""Measure a process from outside, and what it has saved from its files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from secateur.runs.processes import Measured
from secateur.runs.processes import measure as measure_process

# Neither torch nor numpy is imported here, so that this process stays small:
# secateur.runs.processes says why.

BLOCK_LINEAR = re.compile(r"\.(?:layers|h|blocks)\.\d+\..*weight$")

Json: TypeAlias = dict[str, Any]


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
    """Run a contender to its end, its output in ``log``, and measure it.

    Raises:
        SecateurError: it failed; the end of its output is shown.
    """
    return measure_process(command, log, child_environment())


def child_environment() -> dict[str, str]:
    """Return the environment of every contender: the same threads, no look-ups on the hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def made_folder(name: str) -> Path:
    """Return the folder of a command line's argument; made if there is none."""
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tokens(
    model: Path, calibration: Path, samples: int, length: int, seed: int, file: Path
) -> str:
    """Write the calibration token ids that every contender sees; return their digest."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from secateur.text.calibration import load_calibration
    from secateur.text.options import CalibrationOptions

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
