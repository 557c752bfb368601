"""What a model is worth on a text, each number with the protocol it rests on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.calibration.leakage import find_leakage
from secateur.checkpoint.locate import load_config, load_tokenizer, locate_checkpoint
from secateur.checkpoint.skeleton import positions_of
from secateur.errors import SecateurError
from secateur.evaluation.bootstrap import percentile_interval, resampled_means
from secateur.evaluation.perplexity import split_windows
from secateur.evaluation.scores import Scores, score_windows
from secateur.evaluation.tasks import TaskChoice, ZeroShot, lm_eval_version, zero_shot
from secateur.evaluation.text import EvaluationText, read_dataset, read_text
from secateur.progress import Progress, silent
from secateur.walk.precision import DtypeName, resolve_device, resolve_dtype

# Where a pruned checkpoint keeps the tokens it was calibrated on.
_CALIBRATION = Path("secateur", "calibration.safetensors")


Interval = tuple[float, float]


class Protocol(BaseModel):
    """How the numbers of an evaluation were made."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(description="file name, or name, configuration and split of a data set")
    text_sha256: str = Field(description="of the text in UTF-8")
    text_tokens: int = Field(description="tokens of the whole text")
    text_words: int = Field(description="words of the whole text, separated by white space")
    tokenizer: str = Field(description="what the tokenizer belongs to")
    bos: Literal["none", "each window"] = Field(description="where beginning-of-text tokens are")
    window: int = Field(description="tokens per window; windows do not overlap")
    windows: int = Field(description="windows used")
    predicted_tokens: int = Field(description="window - 1 positions of each window")
    forward_dtype: str = Field(description="of matrix products; softmax and loss are fp32")
    device: str


class Figures(BaseModel):
    """How well one model predicts the text."""

    model_config = ConfigDict(frozen=True)

    model: str
    weights_dtype: str
    loss: float = Field(description="mean negative log-likelihood per token in nats")
    perplexity: float = Field(description="per token, exp of the loss")
    interval: Interval | None = Field(
        description="95 % interval of the perplexity, windows resampled; null for a single window"
    )
    word_perplexity: float | None = Field(
        description="per word, exp(loss x tokens / words); null where white space parts no words"
    )


class Divergence(BaseModel):
    """How far a model is from the dense one."""

    model_config = ConfigDict(frozen=True)

    kl: float = Field(description="mean KL(dense || model) per predicted token in nats")
    kl_interval: Interval | None = Field(description="95 %, windows resampled")
    top1_agreement: float = Field(description="share of positions with the same likeliest token")


class Difference(BaseModel):
    """Dense minus model on the same windows: negative where the model is worse."""

    model_config = ConfigDict(frozen=True)

    loss: float = Field(description="in nats per token")
    loss_interval: Interval | None = Field(description="95 %, windows resampled in pairs")
    perplexity: float
    perplexity_interval: Interval | None = Field(description="95 %, from the same resamples")


class Evaluation(BaseModel):
    """What ``evaluate`` returns; ``model_dump(mode="json")`` is what ``--json`` prints."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    model: Figures | None = Field(None, description="with a text only")
    dense: Figures | None = Field(None, description="the model evaluated against")
    divergence: Divergence | None = Field(None, description="with a dense model only")
    difference: Difference | None = Field(None, description="with a dense model only")
    protocol: Protocol | None = Field(None, description="with a text only")
    zero_shot: ZeroShot | None = Field(None, description="with tasks only")
    seconds: float = Field(description="wall time of the forward passes over the text")
    notes: list[str] = Field(default_factory=list, description="what to know before quoting this")


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
    given = _Inputs.check(
        model,
        text=text,
        dataset=dataset,
        window=window,
        max_windows=max_windows,
        tasks=tasks,
        task_data=task_data,
        limit=limit,
        against=against,
        bos=bos,
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


def fingerprint_evaluation(
    model: str | Path,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    bos: bool = False,
    device: str = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check what ``evaluate`` would be given, and say all that decides its numbers.

    No weights are read. Arguments are those of ``evaluate``.

    Raises:
        SecateurError: whatever ``evaluate`` would raise before it reads weights.
    """
    place = resolve_device(device)
    given = _Inputs.check(
        model,
        text=text,
        dataset=dataset,
        window=window,
        max_windows=max_windows,
        tasks=tasks,
        task_data=task_data,
        limit=limit,
        against=None,
        bos=bos,
        tokenizer=None,
        trust_remote_code=trust_remote_code,
    )
    passage, choice = given.passage, given.choice
    return {
        "text": passage and passage.text.sha256,
        "windows": passage and list(passage.windows_WL.shape),
        "bos": bos,
        "tasks": choice and {"data": choice.data, "limit": limit, "lm_eval": lm_eval_version()},
        "forward": f"{resolve_dtype(dtype, place)} on {place.type}",
    }


@dataclass(frozen=True)
class _Inputs:
    """What an evaluation is given, found and checked; no weights have been read."""

    subject: _Subject
    rival: _Subject | None
    tokenizer: PreTrainedTokenizerBase
    passage: Passage | None
    choice: TaskChoice | None

    @classmethod
    def check(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        text: str | Path | None,
        dataset: str | None,
        window: int,
        max_windows: int | None,
        tasks: Sequence[str],
        task_data: str | Path | None,
        limit: int | None,
        against: str | Path | PreTrainedModel | None,
        bos: bool,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> _Inputs:
        choice = TaskChoice.check(tasks, task_data, limit) if tasks else None
        texts = sum(source is not None for source in (text, dataset))
        if texts > 1 or (not texts and choice is None):
            raise SecateurError(
                "Evaluation needs either a text file or a data set, or else tasks; name one."
            )
        subject = _Subject.find(model, trust_remote_code)
        rival = None if against is None else _Subject.find(against, trust_remote_code)
        tokenizer = tokenizer or _common_tokenizer(subject, rival)
        passage = None
        if texts:
            content = read_text(text) if text is not None else read_dataset(str(dataset))
            passage = Passage.cut(content, tokenizer, window, max_windows, bos)
        for each in filter(None, (subject, rival)):
            each.check(passage, subject.vocabulary)
        return cls(subject, rival, tokenizer, passage, choice)


@dataclass(frozen=True)
class Passage:
    """A text cut into windows.

    Attributes:
        text: what was read.
        tokens: of the whole text.
        windows_WL: int64 (windows, length).
    """

    text: EvaluationText
    tokens: int
    windows_WL: Tensor

    @classmethod
    def cut(
        cls,
        text: EvaluationText,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        max_windows: int | None,
        bos: bool,
    ) -> Passage:
        """Tokenise a text whole, without special tokens, and cut it.

        Raises:
            SecateurError: it is shorter than a window, or there is no token to begin windows with.
        """
        encoded = tokenizer(
            text.content, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        tokens_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        first = _bos_token(tokenizer) if bos else None
        return cls(text, len(tokens_N), split_windows(tokens_N, window, max_windows, first))

    @property
    def tokens_per_word(self) -> float:
        """Tokens of the whole text over its words."""
        return self.tokens / self.text.words


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


@dataclass(frozen=True)
class _Subject:
    """A model to evaluate, in memory or in a folder that has not been read yet."""

    name: str
    place: PreTrainedModel | Path
    config: PreTrainedConfig
    trust_remote_code: bool

    @classmethod
    def find(cls, model: str | Path | PreTrainedModel, trust_remote_code: bool) -> _Subject:
        if isinstance(model, PreTrainedModel):
            name = model.config.name_or_path or type(model).__name__
            return cls(name, model, model.config, trust_remote_code)
        folder = locate_checkpoint(model, trust_remote_code=trust_remote_code)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        return cls(str(model), folder, config, trust_remote_code)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if isinstance(self.place, PreTrainedModel):
            return None
        return load_tokenizer(self.place, trust_remote_code=self.trust_remote_code)

    def check(self, passage: Passage | None, vocabulary: int) -> None:
        """Find out what does not fit before any weight is read."""
        if self.vocabulary != vocabulary:
            raise SecateurError(
                f"{self.name} has a vocabulary of {self.vocabulary} tokens and the evaluated model "
                f"one of {vocabulary}; compare a model with the dense one it was made from."
            )
        if passage is None:
            return
        positions, window = positions_of(self.config), passage.windows_WL.shape[1]
        if positions is not None and window > positions:
            raise SecateurError(
                f"Evaluation windows of {window} tokens are longer than the {positions} positions "
                f"of {self.name}; use a window of {positions} or less."
            )
        if (highest := int(passage.windows_WL.max())) >= vocabulary:
            raise SecateurError(
                f"The tokenizer gives token {highest} and {self.name} knows "
                f"{vocabulary} tokens; use the model's own tokenizer."
            )

    def load(self, device: torch.device, forward_dtype: torch.dtype) -> PreTrainedModel:
        if isinstance(self.place, PreTrainedModel):
            return self.place
        try:
            answer = AutoModelForCausalLM.from_pretrained(
                self.place,
                dtype="auto" if forward_dtype == torch.bfloat16 else forward_dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise SecateurError(
                f"{self.name} cannot be loaded ({str(error).strip().splitlines()[0]}); check its "
                "files, or fetch or prune it again."
            ) from error
        model, report = cast(tuple[PreTrainedModel, dict[str, set[str]]], answer)
        if missing := report["missing_keys"]:
            # transformers would fill them with random numbers.
            raise SecateurError(
                f"The files of {self.name} lack {min(missing)}; fetch or prune it again."
            )
        torch.nn.Module.to(model, device)
        return model


def _common_tokenizer(subject: _Subject, rival: _Subject | None) -> PreTrainedTokenizerBase:
    tokenizer = subject.tokenizer()
    other = None if rival is None else rival.tokenizer()
    if tokenizer is None:
        raise SecateurError(
            f"Evaluating {subject.name} in memory needs its tokenizer; pass tokenizer=."
        )
    if rival is not None and other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise SecateurError(
            f"{subject.name} and {rival.name} have different tokenizers, so their predictions "
            "cannot be compared; name the dense model it was made from."
        )
    return tokenizer


def _bos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise SecateurError(
            "The tokenizer has no beginning-of-text token to begin windows with; leave bos out."
        )
    return int(tokenizer.bos_token_id)


def _leakage_notes(
    subject: _Subject, tokenizer: PreTrainedTokenizerBase, text: EvaluationText
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
