"""What a model is worth on a text and on tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.inputs import GivenModel, Inputs
from secateur.evaluation.intervals import FEWEST_WINDOWS, Means
from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.scores import score_windows
from secateur.evaluation.tasks import zero_shot
from secateur.evaluation.text import EvaluationText
from secateur.report.documents.evaluation import Evaluation, Protocol
from secateur.runs.device import DtypeName, resolve_device, resolve_dtype
from secateur.runs.progress import Progress, silent
from secateur.text.beginning import Beginning
from secateur.text.leakage import find_leakage

# Where a pruned checkpoint keeps the tokens it was calibrated on.
_CALIBRATION = Path("secateur", "calibration.safetensors")


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    against: str | Path | PreTrainedModel | None = None,
    bos: Beginning | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity on a text, answers to zero-shot tasks, and how far the dense model is.

    The text is tokenised in one piece and cut into windows that do not overlap; the tail is
    dropped. Weights keep the dtype they are stored in unless ``dtype`` is float32.

    Args:
        model: checkpoint folder, hub id, GGUF file, or a model in memory, which stays where it is.
        text: a .txt or .jsonl file; either this or ``dataset``, or neither if there are tasks.
        dataset: ``wikitext2`` or ``USER/NAME[:CONFIG][:SPLIT]`` of the Hugging Face hub.
        window: tokens per window.
        max_windows: use the first so many windows.
        tasks: names of ``TASKS``, evaluated with lm-eval's prompts and metrics.
        task_data: a folder of local files, TASK_SPLIT.jsonl; the hub if None.
        limit: use the first so many questions of each task.
        against: the dense model: adds its figures, KL divergence and top-1 agreement.
        bos: where the beginning-of-text token stands: in every ``window``, once at the head of
            the ``text``, or nowhere, ``none``; in every window if None and the tokenizer adds one.
            Prompts of tasks begin with it too.
        tokenizer: required for a model in memory; the checkpoint's own if None.
        device: of checkpoints that are loaded: auto, cpu, cuda or cuda:N.
        dtype: of matrix products: auto, float32 or bfloat16 (autocast).
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a model, a text or task data that cannot be read or are too short, windows
            longer than the model's positions, models of different vocabularies, or logits that
            are not finite.
    """
    options = EvaluationOptions.of(
        text=text,
        dataset=dataset,
        window=window,
        max_windows=max_windows,
        bos=bos,
        tasks=tuple(tasks),
        task_data=task_data,
        limit=limit,
    )
    given = Inputs.check(model, options, against, tokenizer, trust_remote_code, progress)
    encoder, passage = given.encoder, given.passage
    place = model.device if isinstance(model, PreTrainedModel) else resolve_device(device)
    forward_dtype = resolve_dtype(dtype, place)
    # Under autocast, weights keep their own dtype.
    stored = None if forward_dtype == torch.bfloat16 else forward_dtype
    models = [
        (each.name, each.load(place, stored)) for each in filter(None, (given.model, given.dense))
    ]
    (_, pruned), *others = models
    products = _name(pruned.dtype if stored else forward_dtype)
    answers = None
    if given.choice is not None:
        answers = zero_shot(models, encoder, given.choice, forward_dtype, products, progress)
    if passage is None:
        return Evaluation(zero_shot=answers, seconds=0.0)

    started = time.perf_counter()
    dense = others[0][1] if others else None
    scores = score_windows(
        pruned, passage.windows_WL, dense=dense, dtype=forward_dtype, progress=progress
    )
    seconds = time.perf_counter() - started
    means, windows = Means.of(scores), len(passage.windows_WL)
    figures = [
        means.figures(row, name, _name(loaded.dtype), passage.tokens_per_word)
        for row, (name, loaded) in enumerate(models)
    ]
    return Evaluation(
        model=figures[0],
        dense=figures[1] if others else None,
        divergence=means.divergence() if others else None,
        difference=means.difference() if others else None,
        protocol=Protocol(
            text=passage.text.name,
            text_sha256=passage.text.sha256,
            text_tokens=passage.tokens,
            text_words=passage.text.words,
            tokenizer=encoder.tokenizer.name_or_path or given.model.name,
            bos=encoder.bos,
            window=window,
            windows=windows,
            predicted_tokens=windows * (window - 1),
            forward_dtype=products,
            device=str(pruned.device),
        ),
        zero_shot=answers,
        seconds=seconds,
        notes=[
            *_few_windows(windows),
            *_beginning_alone(passage.text),
            *_leakage(given.model, encoder.tokenizer, passage.text),
        ],
    )


def _few_windows(windows: int) -> list[str]:
    if windows >= FEWEST_WINDOWS:
        return []
    few = "1 window is" if windows == 1 else f"{windows} windows are"
    return [f"{few} too few for 95 % intervals; evaluate {FEWEST_WINDOWS} or more."]


def _beginning_alone(text: EvaluationText) -> list[str]:
    if text.whole:
        return []
    return [
        f"Of {text.name} the first {len(text.content):,} characters were read; its hash, words and "
        "tokens are those of this part."
    ]


def _leakage(
    model: GivenModel, tokenizer: PreTrainedTokenizerBase, text: EvaluationText
) -> list[str]:
    """Hold the text against the calibration tokens that a pruned checkpoint keeps."""
    if isinstance(model.place, PreTrainedModel):
        return []
    saved = model.place / _CALIBRATION
    if not saved.is_file():
        return []
    calibration = tokenizer.batch_decode(load_file(saved)["tokens"], skip_special_tokens=True)
    warning = find_leakage(calibration, text.content).warning
    return [] if warning is None else [warning]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
