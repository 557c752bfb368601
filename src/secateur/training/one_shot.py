"""A one-shot pruned checkpoint to start from, made of the dense model and the training text."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from secateur.models.locate import load_tokenizer
from secateur.pruning.prune import prune
from secateur.pruning.recipe import Recipe
from secateur.report.documents.prune import Report
from secateur.runs.files import write_text
from secateur.runs.progress import Progress
from secateur.training.job import Job

_SAMPLES = 128
_LENGTH = 512
# Windows are drawn from so many times the tokens that they hold.
_POOL = 4


def prune_first(job: Job, progress: Progress) -> tuple[Path, Report]:
    """Prune the dense model by the recipe ``auto`` inside the run's work folder, or go on with it.

    Calibration text is the beginning of the training text, so held-out windows stay unseen. It is
    kept as a file of JSON lines, and the recipe in the report is one that ``prune`` takes.

    Returns:
        The folder of the pruned checkpoint, and its report.
    """
    work = job.work / "start"
    text, output = work / "text.jsonl", work / "pruned"
    if not text.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(text, _as_documents(job))
    recipe = Recipe.from_mapping(
        {
            "pattern": str(job.options.pattern),
            "stages": "auto",
            "calibration": {
                "source": str(text.resolve()),
                "samples": _SAMPLES,
                "length": min(_LENGTH, job.options.length),
                "seed": job.options.seed,
            },
            "device": str(job.device),
            "dtype": str(job.dtype).removeprefix("torch."),
        }
    )
    result = prune(
        job.model.folder,
        recipe,
        output,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )
    return output, result.report


def _as_documents(job: Job) -> str:
    tokenizer = load_tokenizer(job.model.folder, trust_remote_code=job.trust_remote_code)
    windows: Tensor = job.text.train_WL[: -(-_POOL * _SAMPLES * _LENGTH // job.options.length)]
    texts = (tokenizer.decode(window) for window in windows.tolist())
    return "".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\n" for text in texts)
