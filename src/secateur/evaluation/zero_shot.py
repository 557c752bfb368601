"""Answers to tasks without examples in the prompt, scored by lm-eval."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.tasks import TaskChoice, lm_eval_version, load_tasks
from secateur.report.documents.evaluation import TaskScore, TaskScores, ZeroShot
from secateur.runs.progress import Progress, silent


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choice: TaskChoice,
    *,
    name: str,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> TaskScores:
    """Evaluate a model on tasks without examples, with lm-eval.

    Args:
        model: a causal language model, where it is.
        tokenizer: its tokenizer.
        choice: from ``TaskChoice.check``.
        name: what the model is called in the result.
        dtype: of matrix products; bfloat16 means autocast.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: data that cannot be fetched or have another form than the hub's.
    """
    import lm_eval

    from secateur.evaluation.likelihood import Likelihood

    lm = Likelihood(model, tokenizer, dtype, progress)
    with tempfile.TemporaryDirectory(prefix="secateur-tasks-") as scratch, _quiet():
        loaded = load_tasks(choice, Path(scratch))
        answer: Any = lm_eval.evaluate(
            lm, loaded, limit=choice.limit, bootstrap_iters=1, log_samples=False
        )
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


def zero_shot(
    models: Sequence[tuple[str, PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    choice: TaskChoice,
    *,
    dtype: torch.dtype,
    dtype_name: str,
    progress: Progress = silent,
) -> ZeroShot:
    """Evaluate a model on tasks, and beside it the dense one if that comes second."""
    started = time.perf_counter()
    first, *second = (
        run_tasks(model, tokenizer, choice, name=name, dtype=dtype, progress=progress)
        for name, model in models
    )
    return ZeroShot(
        model=first,
        dense=second[0] if second else None,
        lm_eval=lm_eval_version(),
        data=choice.data,
        limit=choice.limit,
        forward_dtype=dtype_name,
        seconds=time.perf_counter() - started,
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
