"""What a model is worth on a text and on tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.bootstrap import percentile_interval, resampled_means
from secateur.evaluation.inputs import Inputs, Subject
from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.scores import Scores, score_windows
from secateur.evaluation.text import EvaluationText
from secateur.evaluation.zero_shot import zero_shot
from secateur.report.documents.evaluation import (
    Difference,
    Divergence,
    Evaluation,
    Figures,
    Protocol,
)
from secateur.runs.device import DtypeName, resolve_device, resolve_dtype
from secateur.runs.progress import Progress, silent
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
    bos: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity on a text, answers to zero-shot tasks, and how far the dense model is.

    The text is tokenised whole without special tokens and cut into windows that do not overlap;
    the tail is dropped. Weights keep the dtype they are stored in unless ``dtype`` is float32.

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
        bos: begin every window with the beginning-of-text token, as Gemma models need.
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
    options = EvaluationOptions(
        text=text,
        dataset=dataset,
        window=window,
        max_windows=max_windows,
        bos=bos,
        tasks=tuple(tasks),
        task_data=task_data,
        limit=limit,
    )
    given = Inputs.check(
        model,
        options,
        against=against,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    subject, rival, tokenizer = given.subject, given.rival, given.tokenizer
    passage, choice = given.passage, given.choice
    place = model.device if isinstance(model, PreTrainedModel) else resolve_device(device)
    forward_dtype = resolve_dtype(dtype, place)
    pruned = subject.load(place, forward_dtype)
    dense = None if rival is None else rival.load(place, forward_dtype)
    # Without autocast the weights decide.
    products = _dtype_name(forward_dtype if forward_dtype == torch.bfloat16 else pruned.dtype)
    models = [(subject.name, pruned), *([(rival.name, dense)] if rival and dense else [])]
    answers = None
    if choice is not None:
        answers = zero_shot(
            models, tokenizer, choice, dtype=forward_dtype, dtype_name=products, progress=progress
        )
    if passage is None:
        return Evaluation(zero_shot=answers, seconds=0.0)

    started = time.perf_counter()
    scores = score_windows(
        pruned, passage.windows_WL, dense=dense, dtype=forward_dtype, progress=progress
    )
    seconds = time.perf_counter() - started
    figures = _Summary.of(scores)
    first, *second = (
        figures.of_model(row, name, loaded, passage.tokens_per_word)
        for row, (name, loaded) in enumerate(models)
    )
    return Evaluation(
        model=first,
        dense=second[0] if second else None,
        divergence=figures.divergence() if second else None,
        difference=figures.difference() if second else None,
        protocol=Protocol(
            text=passage.text.name,
            text_sha256=passage.text.sha256,
            text_tokens=passage.tokens,
            text_words=passage.text.words,
            tokenizer=tokenizer.name_or_path or subject.name,
            bos="each window" if bos else "none",
            window=window,
            windows=len(passage.windows_WL),
            predicted_tokens=len(passage.windows_WL) * (window - 1),
            forward_dtype=products,
            device=str(pruned.device),
        ),
        zero_shot=answers,
        seconds=seconds,
        notes=_leakage_notes(subject, tokenizer, passage.text),
    )


@dataclass(frozen=True)
class _Summary:
    """Means over windows, and the same means of resampled windows.

    Attributes:
        mean: rows are loss, and with a dense model its loss, divergence and agreement.
        means_KR: the same rows by resample; None for a single window.
    """

    mean: list[float]
    means_KR: Tensor | None

    @classmethod
    def of(cls, scores: Scores) -> _Summary:
        rows = [scores.loss_W]
        if (compared := scores.comparison) is not None:
            rows += [compared.dense_loss_W, compared.divergence_W, compared.agreement_W]
        values_KW = torch.stack(rows)
        resampled = resampled_means(values_KW) if values_KW.shape[1] > 1 else None
        return cls(values_KW.mean(1).tolist(), resampled)

    def of_model(
        self, row: int, name: str, model: PreTrainedModel, tokens_per_word: float
    ) -> Figures:
        loss = self.mean[row]
        return Figures(
            model=name,
            weights_dtype=_dtype_name(model.dtype),
            loss=loss,
            perplexity=math.exp(loss),
            interval=None
            if self.means_KR is None
            else percentile_interval(self.means_KR[row].exp()),
            word_perplexity=math.exp(per_word)
            if (per_word := loss * tokens_per_word) < 700
            else None,
        )

    def divergence(self) -> Divergence:
        return Divergence(
            kl=self.mean[2],
            kl_interval=None if self.means_KR is None else percentile_interval(self.means_KR[2]),
            top1_agreement=self.mean[3],
        )

    def difference(self) -> Difference:
        loss, dense_loss = self.mean[:2]
        losses = perplexities = None
        if self.means_KR is not None:
            model_R, dense_R = self.means_KR[:2]
            losses = percentile_interval(dense_R - model_R)
            perplexities = percentile_interval(dense_R.exp() - model_R.exp())
        return Difference(
            loss=dense_loss - loss,
            loss_interval=losses,
            perplexity=math.exp(dense_loss) - math.exp(loss),
            perplexity_interval=perplexities,
        )


def _leakage_notes(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, text: EvaluationText
) -> list[str]:
    """Hold the text against the calibration tokens that a pruned checkpoint keeps."""
    if isinstance(subject.place, PreTrainedModel):
        return []
    saved = subject.place / _CALIBRATION
    if not saved.is_file():
        return []
    calibration = tokenizer.batch_decode(load_file(saved)["tokens"], skip_special_tokens=True)
    warning = find_leakage(calibration, text.content).warning
    return [] if warning is None else [warning]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
