"""What a model is worth on a text, each number with the protocol it rests on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

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
from secateur.evaluation.perplexity import split_windows
from secateur.evaluation.scores import score_windows
from secateur.evaluation.text import EvaluationText, read_dataset, read_text
from secateur.progress import Progress, silent
from secateur.walk.precision import DtypeName, resolve_device, resolve_dtype

# Where a pruned checkpoint keeps the tokens it was calibrated on.
_CALIBRATION = Path("secateur", "calibration.safetensors")
_NORMAL_95 = 1.96


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
    interval: tuple[float, float] | None = Field(
        description="95 % interval of the perplexity over windows; null for a single window"
    )
    word_perplexity: float | None = Field(
        description="per word, exp(loss x tokens / words); null where white space parts no words"
    )


class Divergence(BaseModel):
    """How far a model is from the dense one."""

    model_config = ConfigDict(frozen=True)

    kl: float = Field(description="mean KL(dense || model) per predicted token in nats")
    top1_agreement: float = Field(description="share of positions with the same likeliest token")


class Evaluation(BaseModel):
    """What ``evaluate`` returns; ``model_dump(mode="json")`` is what ``--json`` prints."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    model: Figures
    dense: Figures | None = Field(None, description="the model evaluated against")
    divergence: Divergence | None = Field(None, description="with a dense model only")
    protocol: Protocol
    seconds: float = Field(description="wall time of the forward passes")
    notes: list[str] = Field(default_factory=list, description="what to know before quoting this")


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    against: str | Path | PreTrainedModel | None = None,
    bos: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity on a text, and the distance from a dense model.

    The text is tokenised whole without special tokens and cut into windows that do not overlap;
    the tail is dropped. Weights keep the dtype they are stored in unless ``dtype`` is float32.

    Args:
        model: checkpoint folder, hub id, GGUF file, or a model in memory, which stays where it is.
        text: a .txt or .jsonl file; either this or ``dataset``.
        dataset: ``wikitext2`` or ``USER/NAME[:CONFIG][:SPLIT]`` of the Hugging Face hub.
        window: tokens per window.
        max_windows: use the first so many windows.
        against: the dense model: adds its figures, KL divergence and top-1 agreement.
        bos: begin every window with the beginning-of-text token, as Gemma models need.
        tokenizer: required for a model in memory; the checkpoint's own if None.
        device: of checkpoints that are loaded: auto, cpu, cuda or cuda:N.
        dtype: of matrix products: auto, float32 or bfloat16 (autocast).
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: a model or text that cannot be read or is too short, windows longer than
            the model's positions, models of different vocabularies, or logits that are not finite.
    """
    if (text is None) == (dataset is None):
        raise SecateurError("Evaluation needs either a text file or a data set; name one of them.")
    subject = _Subject.find(model, trust_remote_code)
    rival = None if against is None else _Subject.find(against, trust_remote_code)
    if tokenizer is None:
        tokenizer = _common_tokenizer(subject, rival)
    content = read_text(text) if text is not None else read_dataset(str(dataset))
    encoded = tokenizer(
        content.content, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    tokens_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    first = _bos_token(tokenizer) if bos else None
    windows_WL = split_windows(tokens_N, window, max_windows, first)
    for each in filter(None, (subject, rival)):
        each.check(windows_WL, subject.vocabulary)

    place = model.device if isinstance(model, PreTrainedModel) else resolve_device(device)
    forward_dtype = resolve_dtype(dtype, place)
    pruned = subject.load(place, forward_dtype)
    dense = None if rival is None else rival.load(place, forward_dtype)
    started = time.perf_counter()
    scores = score_windows(pruned, windows_WL, dense=dense, dtype=forward_dtype, progress=progress)
    seconds = time.perf_counter() - started

    # Without autocast the weights decide.
    products = forward_dtype if forward_dtype == torch.bfloat16 else pruned.dtype
    tokens_per_word = len(tokens_N) / content.words
    compared = scores.comparison
    return Evaluation(
        model=_figures(subject.name, pruned, scores.loss_W, tokens_per_word),
        dense=_figures(rival.name, dense, compared.dense_loss_W, tokens_per_word)
        if rival and dense and compared
        else None,
        divergence=Divergence(
            kl=float(compared.divergence_W.mean()),
            top1_agreement=float(compared.agreement_W.mean()),
        )
        if compared
        else None,
        protocol=Protocol(
            text=content.name,
            text_sha256=content.sha256,
            text_tokens=len(tokens_N),
            text_words=content.words,
            tokenizer=tokenizer.name_or_path or subject.name,
            bos="each window" if bos else "none",
            window=window,
            windows=len(windows_WL),
            predicted_tokens=len(windows_WL) * (window - 1),
            forward_dtype=_dtype_name(products),
            device=str(pruned.device),
        ),
        seconds=seconds,
        notes=_leakage_notes(subject, tokenizer, content),
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
        folder = locate_checkpoint(model, trust_remote_code=trust_remote_code, packed=True)
        config = load_config(folder, trust_remote_code=trust_remote_code, packed=True)
        return cls(str(model), folder, config, trust_remote_code)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if isinstance(self.place, PreTrainedModel):
            return None
        return load_tokenizer(self.place, trust_remote_code=self.trust_remote_code)

    def check(self, windows_WL: Tensor, vocabulary: int) -> None:
        """Find out what does not fit before any weight is read."""
        positions, window = positions_of(self.config), windows_WL.shape[1]
        if positions is not None and window > positions:
            raise SecateurError(
                f"Evaluation windows of {window} tokens are longer than the {positions} positions "
                f"of {self.name}; use a window of {positions} or less."
            )
        if self.vocabulary != vocabulary:
            raise SecateurError(
                f"{self.name} has a vocabulary of {self.vocabulary} tokens and the evaluated model "
                f"one of {vocabulary}; compare a model with the dense one it was made from."
            )
        if int(windows_WL.max()) >= vocabulary:
            raise SecateurError(
                f"The tokenizer gives token {int(windows_WL.max())} and {self.name} knows "
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


def _figures(name: str, model: PreTrainedModel, loss_W: Tensor, tokens_per_word: float) -> Figures:
    loss = float(loss_W.mean())
    interval = None
    if len(loss_W) > 1:
        half = _NORMAL_95 * float(loss_W.std()) / math.sqrt(len(loss_W))
        interval = (math.exp(loss - half), math.exp(loss + half))
    return Figures(
        model=name,
        weights_dtype=_dtype_name(model.dtype),
        loss=loss,
        perplexity=math.exp(loss),
        interval=interval,
        word_perplexity=math.exp(per_word) if (per_word := loss * tokens_per_word) < 700 else None,
    )


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
