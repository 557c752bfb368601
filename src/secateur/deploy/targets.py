"""What this machine and its runtimes can gain from: zeros, n:m, smaller shapes, fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.deploy.bench.bench import bench
from secateur.deploy.bench.runtimes import RUNTIMES
from secateur.deploy.bench.runtimes.runtime import find_runtime, is_installed
from secateur.deploy.bench.samples import Sample, write_folder, write_gguf
from secateur.report.documents.bench import Bench, Ratio
from secateur.report.run_files import Run, read_runs
from secateur.report.summary import pattern_of
from secateur.report.terminal import add_row, new_table
from secateur.runs.files import writing
from secateur.runs.machine import Machine, describe_machine
from secateur.runs.progress import Progress, silent

Row = Literal["zeros, half of all", "2:4", "smaller shapes", "fewer bits"]
ROWS: tuple[Row, ...] = ("zeros, half of all", "2:4", "smaller shapes", "fewer bits")

# Larger than the caches of most machines in 16 bits, as real models are.
DENSE = Sample()
_ZEROS = replace(DENSE, keep=(32, 64))
_SEMI = replace(DENSE, keep=(2, 4))
_SMALLER = replace(DENSE, channels=2048, heads=8, groups=2)
_PROTOCOL: dict[str, Any] = {"prefill": 128, "prompt": 32, "decode": 16, "batch": "1", "limit": 30}
# Smaller differences are not called a gain.
_LEAST = 0.03
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
}
# A graphics processor of this generation multiplies 2:4 in its tensor cores.
_SPARSE_CORES = (8, 0)


class Gain(BaseModel):
    """What one thing does in one runtime."""

    row: Row
    runtime: str
    what: str = Field(description="the model that was measured, or the run")
    decode: Ratio | None = Field(description="times faster than dense; null if not measured")
    prefill: Ratio | None

    @property
    def verdict(self) -> str:
        """What is faster by more than such a measurement can be wrong."""
        ratios = {"decode": self.decode, "prefill": self.prefill}
        known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        faster = [name for name, each in known.items() if each.interval[0] > 1 + _LEAST]
        open_ = [name for name, each in known.items() if each.interval[1] > 1 + 3 * _LEAST]
        if faster:
            return "gains in " + " and ".join(faster)
        return "not known, too busy" if open_ else "nothing"


class Targets(BaseModel):
    """What was found on this machine."""

    schema_version: int = 1
    machine: Machine
    features: dict[str, bool] = Field(description="instructions and units that speed depends on")
    runtimes: dict[str, str | None] = Field(description="versions; null if not installed")
    gains: list[Gain]
    notes: list[str]


def targets(
    runs: Sequence[str | Path] = (),
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Targets:
    """Measure small random models in every runtime, and gather what was measured of runs.

    Args:
        runs: folders of finished runs that ``bench`` has measured.
        threads: of each runtime; all cores if None.
        device: of transformers.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a folder holds no finished run, or there is no room for the models.
    """
    found = [gain for run in read_runs(runs) for gain in _gains_of(run)]
    runtimes: dict[str, str | None] = dict.fromkeys([*RUNTIMES, "vllm"])
    notes = []
    with TemporaryDirectory(prefix="secateur-") as scratch:
        for name in RUNTIMES:
            if not is_installed(find_runtime(name)):
                continue
            samples = _samples(name, Path(scratch))
            if not samples:
                runtimes[name] = "installed"
                notes.append(f"{name}: nothing is measured here; export a model and bench it.")
                continue
            (_, dense), *others = samples
            measured = bench(
                [path for _, path in others],
                against=dense,
                threads=threads,
                device=device,
                progress=lambda phase, done, total, name=name: progress(  # type: ignore[misc]
                    f"{name}: {phase.lower()}", done, total
                ),
                **_PROTOCOL,
            )
            runtimes[name] = measured.models[0].version
            found += _gains(name, [row for row, _ in others], measured)
            if not measured.sound:
                notes.append(f"{name}: this machine was too busy for sound figures.")
    share = _SMALLER.parameters / DENSE.parameters
    notes.append(
        f"Measured on a random Llama of {DENSE.parameters / 1e6:.0f} M weights; smaller shapes "
        f"have {share:.0%} of them. Models of your own: secateur bench."
    )
    return Targets(
        machine=describe_machine(torch.device("cpu")),
        features=_features(),
        runtimes=runtimes,
        gains=found,
        notes=notes,
    )


def _samples(runtime: str, folder: Path) -> list[tuple[Row, Path]]:
    """The models of a runtime, dense first."""
    found: list[tuple[Row, Path]] = []
    with writing(folder):
        if runtime == "transformers":
            for name, row, sample in (
                ("dense", ROWS[0], DENSE),
                ("half-zeros", ROWS[0], _ZEROS),
                ("2-of-4", ROWS[1], _SEMI),
                ("smaller", ROWS[2], _SMALLER),
            ):
                write_folder(folder / name, sample)
                found.append((row, folder / name))
        if runtime == "llama.cpp":
            for name, row, sample, form in (
                ("dense-F16", ROWS[0], DENSE, "F16"),
                ("half-zeros-F16", ROWS[0], _ZEROS, "F16"),
                ("2-of-4-F16", ROWS[1], _SEMI, "F16"),
                ("smaller-F16", ROWS[2], _SMALLER, "F16"),
                ("dense-Q8_0", ROWS[3], DENSE, "Q8_0"),
                ("dense-Q4_0", ROWS[3], DENSE, "Q4_0"),
            ):
                path = folder / f"{name}.gguf"
                write_gguf(path, sample, form)
                found.append((row, path))
    return found


def _gains(runtime: str, rows: Sequence[Row], measured: Bench) -> list[Gain]:
    found = []
    for row, model in zip(rows, measured.models[1:], strict=True):
        ratios = {each.work: each.ratio for each in model.figures}
        stem = Path(model.path).stem
        decode, prefill = ratios.get("decode"), ratios.get("prefill")
        found.append(Gain(row=row, runtime=runtime, what=stem, decode=decode, prefill=prefill))
    return found


def _gains_of(run: Run) -> list[Gain]:
    """What ``bench`` has measured of a run, one sequence at a time and in the dense one's form."""
    pattern = pattern_of(run)
    row: Row = ROWS[2] if run.kind in ("shrink", "recover") else ROWS[1 if pattern == "2:4" else 0]
    found = []
    for document in run.benches:
        try:
            measured = Bench.model_validate(document.value)
        except ValidationError:
            # Of another version, or damaged.
            continue
        forms = {model.label: model.form for model in measured.models}
        for model in measured.models:
            ratios = {
                each.work: each.ratio
                for each in model.figures
                if each.batch == 1 and each.ratio and forms.get(each.ratio.base) == model.form
            }
            decode, prefill = ratios.get("decode"), ratios.get("prefill")
            if decode or prefill:
                own = {"what": model.label, "decode": decode, "prefill": prefill}
                found.append(Gain(row=row, runtime=model.runtime, **own))
    return found


def _features() -> dict[str, bool]:
    """Instructions of the processor, and units of the graphics processor."""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((set(line.split()) for line in lines if line.startswith("flags")), flags)
    except OSError:
        flags = {torch.backends.cpu.get_cpu_capability().lower()}
    found = {name: flag in flags for flag, name in _FEATURES.items()}
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _SPARSE_CORES
    return {**found, "GPU": torch.cuda.is_available(), "GPU with 2:4": capable}


def targets_table(found: Targets) -> RenderableType:
    """The machine, then what each thing does in each runtime: times faster than dense."""
    summary = Table(box=None, show_header=False, pad_edge=False)
    there = [name for name, has in found.features.items() if has]
    missing = [name for name, has in found.features.items() if not has]
    absent = [name for name, version in found.runtimes.items() if version is None]
    for name, words in (
        ("machine", [found.machine.processor, f"{found.machine.cores} cores"]),
        ("has", there),
        ("has not", missing),
        ("not installed", absent),
    ):
        add_row(summary, name, ", ".join(words))
    table = new_table("what", "runtime", "model", "decode", "prefill", "verdict")
    for row in ROWS:
        for gain in found.gains:
            if gain.row == row:
                ratios = (_times(each) for each in (gain.decode, gain.prefill))
                add_row(table, row, gain.runtime, gain.what, *ratios, gain.verdict)
    notes = (Text(f"· {note}", style="dim") for note in found.notes)
    return Group(summary, Text(), table, Text(), *notes)


def _times(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}"
