"""How fast models are, and how much memory they take, where they will run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from secateur.deploy.bench.measure import (
    SLICE,
    Contest,
    Measured,
    Series,
    measure,
    phase_of,
)
from secateur.deploy.bench.options import BenchOptions
from secateur.deploy.bench.runtimes import RUNTIMES
from secateur.deploy.bench.runtimes.runtime import (
    Opened,
    Runtime,
    Settings,
    find_runtime,
    is_installed,
    require_installed,
    version_of,
)
from secateur.deploy.bench.statistics import CONFIDENCE, median_interval
from secateur.deploy.bench.worker import Resident, worker
from secateur.models.files import find_weights
from secateur.report.documents.bench import (
    Bench,
    BenchFigure,
    BenchModel,
    BenchProtocol,
    Memory,
    Ratio,
    Repetition,
)
from secateur.report.format import bytes_text
from secateur.report.page import write_report
from secateur.report.run_files import distinct_names
from secateur.runs.device import resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json
from secateur.runs.machine import describe_machine
from secateur.runs.progress import Progress, silent

# A ratio is sound if half of its interval is as much of it.
_SOUND = 0.03


@dataclass(frozen=True)
class _Contender:
    """A model in a runtime, before it is loaded."""

    path: Path
    label: str
    runtime: Runtime
    opened: Opened
    base: int | None = None


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Bench:
    """Measure models in every runtime that is installed and opens them, in turn.

    A folder of safetensors runs in transformers, a .gguf file in llama.cpp, a folder with
    openvino_model.xml in OpenVINO, each in a process of its own.

    Args:
        models: checkpoint folders and files.
        against: the model that the others are held against; the first of them if None.
        trust_remote_code: let checkpoints' own Python code run.
        progress: called with (phase, done, total).
        options: of ``BenchOptions``.

    Raises:
        SecateurError: no runtime opens a model, a runtime is not installed, a model is damaged or
            shorter than what is asked for, there is too little memory, or a process died.
    """
    chosen = BenchOptions.of(**options)
    began = time.monotonic()
    threads = chosen.threads or _cores()
    if threads > _cores():
        raise SecateurError(f"There are {_cores()} cores here for {threads} threads; use fewer.")
    device = resolve_device(chosen.device)
    settings = Settings(
        threads, chosen.batch[-1], chosen.length, str(device), chosen.dtype, trust_remote_code
    )
    paths = [Path(each).expanduser() for each in ([against] if against else [])]
    paths += [Path(each).expanduser() for each in models]
    contenders = _contenders(paths, settings, chosen)
    _check_memory(contenders, settings)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                worker(each.label, each.runtime.name, each.path, settings, each.opened.vocabulary)
            )
            for each in contenders
        ]
        devices = [each.opened.device for each in contenders]
        contest = Contest.of(workers, [each.base for each in contenders], devices, threads)
        measured = measure(contest, chosen, progress)
        residents = [each.memory() for each in workers]
    found = [
        _model(contenders, place, resident, measured, contest)
        for place, resident in enumerate(residents)
    ]
    busy = sum(each.others for each in measured.series)
    busy /= sum(each.seconds for each in measured.series)
    doubtful = _doubtful(measured, contest)
    return Bench(
        machine=describe_machine(device),
        protocol=BenchProtocol(
            threads=threads,
            prefill=chosen.prefill,
            prompt=chosen.prompt,
            decode=chosen.decode,
            turns=chosen.turns,
            slice_seconds=SLICE if contest.sliced else None,
            confidence=CONFIDENCE,
        ),
        models=found,
        sound=not doubtful,
        busy_cores=busy,
        seconds=time.monotonic() - began,
        notes=[*_notes(contenders, busy, threads, doubtful), *measured.left_out],
    )


def keep(result: Bench, folders: Sequence[Path]) -> list[Path]:
    """Put a result beside the reports of runs, and make their pages anew.

    Args:
        result: what ``bench`` returned.
        folders: of runs; those without a report are passed over.

    Returns:
        The pages.
    """
    pages = []
    for folder in dict.fromkeys(folders):
        if (folder / "report.json").is_file():
            # Another command that measures other files of the run leaves this one's result there.
            name = "-".join(dict.fromkeys(["bench", *_exported(result)]))
            write_json(folder / "secateur" / f"{name}.json", result.model_dump(mode="json"))
            pages.append(write_report(folder))
    return pages


def _exported(result: Bench) -> list[str]:
    """Names of what was held against the base and is no run itself, such as exported files."""
    compared = [
        Path(each.path)
        for each in result.models
        if any(figure.ratio is not None for figure in each.figures)
    ]
    others = [path for path in compared if not (path / "report.json").is_file()]
    return [path.stem if path.is_file() else path.name for path in others]


def require_runs(folders: Sequence[Path]) -> None:
    """Raise SecateurError unless all folders are those of finished runs."""
    for folder in folders:
        if not (folder / "report.json").is_file():
            raise SecateurError(f"{folder} has no report.json; name the folder of a finished run.")


def _cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


def _contenders(
    paths: Sequence[Path], settings: Settings, options: BenchOptions
) -> list[_Contender]:
    """Every model in every runtime that opens it, and which of the first path's it is held against.

    A path that is there twice is measured twice, which shows how far figures can be trusted.
    """
    names = _names(paths)
    found: list[_Contender] = []
    bases: dict[str, int] = {}
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        for runtime in _runtimes(path, options):
            opened = runtime.check(path, settings)
            _check_length(path, opened, options)
            base = bases.get(runtime.name, 0) if number else None
            if number == 0:
                bases[runtime.name] = len(found)
            found.append(_Contender(path, name, runtime, opened, base))
    if len({each.runtime.name for each in found}) > 1:
        found = [replace(each, label=f"{each.label} in {each.runtime.name}") for each in found]
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    real = [path.resolve() for path in paths]
    different = list(dict.fromkeys(real))
    names = dict(zip(different, distinct_names(different), strict=True))
    return [
        names[path] + (f" ({earlier + 1})" if (earlier := real[:place].count(path)) else "")
        for place, path in enumerate(real)
    ]


def _runtimes(path: Path, options: BenchOptions) -> list[Runtime]:
    """The runtimes that open a path, of those that are installed and wanted."""
    reading = [runtime for name in RUNTIMES if (runtime := find_runtime(name)).reads(path)]
    if not reading:
        if not path.exists():
            raise SecateurError(f"There is no file or folder {path}; check the path.")
        if path.is_dir():
            # It says what is missing.
            find_weights(path)
        raise SecateurError(
            f"No runtime opens {path}; name a checkpoint folder, a .gguf file, or a folder with "
            "openvino_model.xml."
        )
    wanted = [each for each in reading if each.name in (options.runtimes or RUNTIMES)]
    if not wanted:
        raise SecateurError(
            f"{path} is opened by {' and '.join(each.name for each in reading)}, which --runtimes "
            "leaves out; name it there, or leave out the file."
        )
    installed = [each for each in wanted if is_installed(each)]
    if not installed:
        require_installed(wanted[0], path)
    return installed


def _check_length(path: Path, opened: Opened, options: BenchOptions) -> None:
    if opened.positions is not None and options.length > opened.positions:
        raise SecateurError(
            f"{path} has {opened.positions} positions, and {options.length} are needed; ask for "
            "less with --prefill, --prompt and --decode."
        )
    if opened.vocabulary < 4:
        raise SecateurError(f"{path} does not say how many tokens it knows; make it again.")


def _check_memory(contenders: Sequence[_Contender], settings: Settings) -> None:
    """Refuse what does not fit, since all models stay in memory while they are measured in turn."""
    tokens = settings.batch * settings.length
    on_host = [each.opened for each in contenders if each.opened.device == "cpu"]
    needed = sum(each.memory_bytes + tokens * each.token_bytes for each in on_host)
    if needed > (free := psutil.virtual_memory().available):
        raise SecateurError(
            f"All models together need about {bytes_text(needed)} of memory at batch "
            f"{settings.batch}, and {bytes_text(free)} are free; measure fewer at once, or smaller "
            "batches with --batch."
        )


def _model(
    contenders: Sequence[_Contender],
    place: int,
    resident: Resident,
    measured: Measured,
    contest: Contest,
) -> BenchModel:
    own = contenders[place]
    return BenchModel(
        label=own.label,
        path=str(own.path),
        runtime=own.runtime.name,
        version=version_of(own.runtime),
        form=", ".join(filter(None, [own.opened.form, resident.kernel])),
        device=own.opened.device,
        file_bytes=own.opened.file_bytes,
        memory=Memory(before=resident.before, loaded=resident.loaded, peak=resident.peak),
        figures=[_figure(each, contenders, place, contest) for each in measured.series],
    )


def _figure(
    series: Series, contenders: Sequence[_Contender], place: int, contest: Contest
) -> BenchFigure:
    task, base = series.task, contenders[place].base
    seconds = median(series.times(place, processor=contest.processor[place]))
    tokens = 0 if task.work == "load" else task.tokens
    ratio = None
    if base is not None:
        found = contest.ratios(series, place, base)
        middle, low, high = median_interval(found)
        ratio = Ratio(
            base=contenders[base].label,
            median=middle,
            interval=(low, high),
            range=(min(found), max(found)),
        )
    return BenchFigure(
        work=task.work,
        batch=task.batch,
        tokens=tokens,
        clock="processor" if contest.processor[place] else "wall",
        seconds=seconds,
        tokens_per_second=task.batch * tokens / seconds if tokens else None,
        ratio=ratio,
        repetitions=[
            Repetition(seconds=each.seconds, processor_seconds=each.processor_seconds)
            for each in series.turns[place]
        ],
    )


def _doubtful(measured: Measured, contest: Contest) -> list[str]:
    """Which figures are not known well enough, and how well they are."""
    return [
        f"{phase_of(series.task)} to {100 * width:.0f} %"
        for series in measured.series
        if series.task.work != "load" and (width := contest.width(series)) > _SOUND
    ]


def _notes(
    contenders: Sequence[_Contender], busy: float, threads: int, doubtful: Sequence[str]
) -> list[str]:
    notes = []
    cores = psutil.cpu_count() or 1
    if busy + threads > cores + 0.1:
        notes.append(
            f"Others used {busy:.1f} of {cores} cores meanwhile, so tokens per second are below "
            "what this machine can do."
        )
    if doubtful:
        notes.append(
            f"This machine was too busy for sound figures: {', '.join(doubtful)} only; measure "
            "again when it is idle, or with a larger --limit."
        )
    for each in contenders:
        base = None if each.base is None else contenders[each.base]
        if base is not None and base.runtime.name != each.runtime.name:
            notes.append(
                f"{each.label} is held against {base.label}: the ratio is one of runtimes as well."
            )
        elif base is not None and base.opened.form != each.opened.form:
            notes.append(
                f"{each.label} is {each.opened.form} and {base.label} {base.opened.form}: the "
                "ratio is one of precision as well."
            )
    return notes
