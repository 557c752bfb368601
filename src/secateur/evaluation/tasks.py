"""Zero-shot tasks: lm-eval's own definitions, on hub data or on local files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files


@dataclass(frozen=True)
class TaskDefinition:
    """Where a task's data and prompts come from.

    Attributes:
        definition: lm-eval's own file, relative to its tasks.
        split: the part of the data that is evaluated.
        description: what is asked, in a line.
    """

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
    """Tasks that can be run: known names, files that are there.

    Attributes:
        files: local file of each task, None where the data come from the hub.
        limit: questions per task.
    """

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
        """Where the questions of each task come from."""
        return {
            name: "hub" if file is None else fingerprint_files([file])
            for name, file in self.files.items()
        }


def lm_eval_version() -> str:
    """Version of the package that prompts and metrics come from."""
    return version("lm_eval")


def _local_file(folder: Path, name: str) -> Path:
    words = _SPLIT_WORDS[TASKS[name].split]
    for word in words:
        if (file := folder / f"{name}_{word}.jsonl").is_file():
            return file
    expected = " or ".join(f"{name}_{word}.jsonl" for word in words)
    raise SecateurError(f"{folder} has no file {expected}; add it, or leave out the task {name}.")


def load_tasks(choice: TaskChoice, scratch: Path) -> Any:
    """Let lm-eval build the tasks from definitions that include its own.

    Args:
        choice: from ``TaskChoice.check``.
        scratch: an empty folder, which is needed no longer than the tasks are.

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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            place = "on the hub" if file is None else f"in {file}"
            raise SecateurError(
                f"The data of {name} {place} cannot be used ({reason}); they need the fields of "
                "the hub's data set."
                if file is not None
                else f"The data of {name} {place} cannot be fetched ({reason}); check the network, "
                "or give local files with --task-data."
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
