"""Zero-shot tasks: lm-eval's own definitions, on hub data or on local files, scored by lm-eval."""

from __future__ import annotations

import difflib
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from transformers import PreTrainedModel

from secateur.report.documents.evaluation import TaskScore, TaskScores, ZeroShot
from secateur.runs.errors import SecateurError, reason_of
from secateur.runs.files import fingerprint_files
from secateur.runs.progress import Progress, silent
from secateur.text.encoder import Encoder


@dataclass(frozen=True)
class TaskDefinition:
    """A task: lm-eval's own file, the split of the data that is evaluated, and what is asked."""

    definition: str
    split: str
    description: str


TASKS = {
    "piqa": TaskDefinition(
        "piqa/piqa.yaml", "validation", "which of two ways reaches an everyday goal"
    ),
    "arc_easy": TaskDefinition("arc/arc_easy.yaml", "test", "school science, the easier questions"),
    "arc_challenge": TaskDefinition(
        "arc/arc_challenge.yaml", "test", "school science, the harder questions"
    ),
    "hellaswag": TaskDefinition(
        "hellaswag/hellaswag.yaml", "validation", "which of four endings a scene has"
    ),
    "openbookqa": TaskDefinition(
        "openbookqa/openbookqa.yaml", "test", "elementary science and common knowledge"
    ),
    "rte": TaskDefinition(
        "glue/rte/default.yaml", "validation", "whether one sentence follows from another"
    ),
    "winogrande": TaskDefinition(
        "winogrande/default.yaml", "validation", "which of two names a gap stands for"
    ),
    "boolq": TaskDefinition(
        "super_glue/boolq/default.yaml", "validation", "yes or no, about a passage"
    ),
    "lambada_openai": TaskDefinition(
        "lambada/lambada_openai.yaml", "test", "the last word of a passage"
    ),
}
"""The tasks that can be asked for, by lm-eval's names."""

_SPLIT_WORDS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class TaskChoice:
    """Tasks that can be run; the local file of each, or None where the data come from the hub."""

    files: dict[str, Path | None]
    limit: int | None

    @classmethod
    def check(
        cls, tasks: Sequence[str], folder: str | Path | None, limit: int | None
    ) -> TaskChoice:
        """Find out what cannot be run, before any model is read.

        Raises:
            SecateurError: an unknown task, a missing file, a bad limit, or lm-eval is missing.
        """
        for name in tasks:
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"tasks are {', '.join(TASKS)}."
                raise SecateurError(f"There is no task {name!r}; {hint}")
        if limit is not None and limit < 1:
            raise SecateurError(f"A limit of {limit} leaves no questions; use 1 or more.")
        if find_spec("lm_eval") is None:
            raise SecateurError(
                "Zero-shot tasks need lm-eval; install it with: pip install 'secateur[tasks]'."
            )
        place = None if folder is None else Path(folder).expanduser()
        if place is not None and not place.is_dir():
            raise SecateurError(f"There is no folder {place} with task data; check the path.")
        files = {name: None if place is None else _local_file(place, name) for name in tasks}
        return cls(files, limit)

    @property
    def data(self) -> dict[str, str]:
        return {
            name: "hub" if file is None else fingerprint_files([file])
            for name, file in self.files.items()
        }


def lm_eval_version() -> str:
    """Version of the package that prompts and metrics come from."""
    return version("lm_eval")


def _local_file(folder: Path, name: str) -> Path:
    names = [f"{name}_{word}.jsonl" for word in _SPLIT_WORDS[TASKS[name].split]]
    for each in names:
        if (file := folder / each).is_file():
            return file
    raise SecateurError(
        f"{folder} has no file {' or '.join(names)}; add it, or leave out the task {name}."
    )


def load_tasks(choice: TaskChoice, scratch: Path) -> Any:
    """Let lm-eval build the tasks from definitions, written to scratch, that include its own.

    Raises:
        SecateurError: data that cannot be fetched or have another form than the hub's.
    """
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    for name, file in choice.files.items():
        definition = _definition(name, file, own, scratch)
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    manager = tasks.TaskManager(include_path=str(scratch), include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}}
    for name, file in choice.files.items():
        try:
            loaded["tasks"] |= manager.load([name])["tasks"]
        except Exception as error:  # the hub, its formats and jinja fail in many ways
            reason = reason_of(error)
            raise SecateurError(
                f"The data of {name} on the hub cannot be fetched ({reason}); check the network, "
                "or give local files with --task-data."
                if file is None
                else f"The data of {name} in {file} cannot be used ({reason}); they need the "
                "fields of the hub's data set."
            ) from error
    return loaded


def _definition(name: str, file: Path | None, own: Path, scratch: Path) -> dict[str, Any]:
    task = TASKS[name]
    definition: dict[str, Any] = {
        "include": str(own / task.definition),
        "task": name,
        "num_fewshot": 0,
    }
    if name == "lambada_openai":
        # Its other metric, perplexity of the last word, would bootstrap for minutes.
        definition["metric_list"] = [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        ]
    if file is not None:
        definition |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {task.split: str(file.resolve())},
                "cache_dir": str(scratch / "data"),
                "keep_in_memory": True,
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{task.split}_split": task.split,
        }
    return definition


def zero_shot(
    models: Sequence[tuple[str, PreTrainedModel]],
    encoder: Encoder,
    choice: TaskChoice,
    dtype: torch.dtype,
    dtype_name: str,
    progress: Progress = silent,
) -> ZeroShot:
    """Evaluate a model on tasks without examples, and the dense one if that comes second.

    Args:
        models: causal language models by name, where they are.
        encoder: of both.
        choice: the tasks.
        dtype: of matrix products; bfloat16 means autocast.
        dtype_name: what the result calls it.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: data that cannot be fetched or have another form than the hub's.
    """
    started = time.perf_counter()
    first, *second = (
        _run_tasks(name, model, encoder, choice, dtype, progress) for name, model in models
    )
    return ZeroShot(
        model=first,
        dense=second[0] if second else None,
        lm_eval=lm_eval_version(),
        data=choice.data,
        bos=encoder.bos,
        limit=choice.limit,
        forward_dtype=dtype_name,
        seconds=time.perf_counter() - started,
    )


def _run_tasks(
    name: str,
    model: PreTrainedModel,
    encoder: Encoder,
    choice: TaskChoice,
    dtype: torch.dtype,
    progress: Progress,
) -> TaskScores:
    import lm_eval

    from secateur.evaluation.likelihood import Likelihood

    likelihood = Likelihood(model, encoder, dtype, progress)
    with tempfile.TemporaryDirectory(prefix="secateur-tasks-") as scratch, _quiet():
        loaded = load_tasks(choice, Path(scratch))
        try:
            answer: Any = lm_eval.evaluate(
                likelihood, loaded, limit=choice.limit, bootstrap_iters=1, log_samples=False
            )
        # What a question lacks shows when its prompt is made.
        except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
            raise SecateurError(
                f"The data of {', '.join(choice.files)} cannot be used ({reason_of(error)}); they "
                "need the fields of the hub's data sets."
            ) from error
    results: dict[str, dict[str, Any]] = answer["results"]
    scores = {
        task: TaskScore(
            items=answer["n-samples"][task]["effective"],
            acc=float(results[task]["acc,none"]),
            acc_stderr=_number(results[task], "acc_stderr,none"),
            acc_norm=_number(results[task], "acc_norm,none"),
            acc_norm_stderr=_number(results[task], "acc_norm_stderr,none"),
        )
        for task in choice.files
    }
    errors = [score.acc_stderr for score in scores.values()]
    known = [error for error in errors if error is not None]
    return TaskScores(
        model=name,
        tasks=scores,
        mean_acc=math.fsum(score.acc for score in scores.values()) / len(scores),
        mean_acc_stderr=math.hypot(*known) / len(known) if len(known) == len(errors) else None,
    )


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's remarks on its own definitions from the user."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
