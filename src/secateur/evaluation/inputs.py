"""Find and check what an evaluation is given, before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.perplexity import split_windows
from secateur.evaluation.tasks import TaskChoice, lm_eval_version
from secateur.evaluation.text import EvaluationText, read_dataset, read_text
from secateur.models.locate import find_folder, load_config, load_tokenizer
from secateur.models.structure import positions_of
from secateur.runs.device import DtypeName, resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError


@dataclass(frozen=True)
class Inputs:
    """What an evaluation is given.

    Attributes:
        subject: the model to evaluate.
        rival: the dense model beside it, if there is one.
        tokenizer: of both.
        passage: the text, if there is one.
        choice: the tasks, if there are any.
    """

    subject: Subject
    rival: Subject | None
    tokenizer: PreTrainedTokenizerBase
    passage: Passage | None
    choice: TaskChoice | None

    @classmethod
    def check(
        cls,
        model: str | Path | PreTrainedModel,
        options: EvaluationOptions,
        *,
        against: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
    ) -> Inputs:
        """Find models, tokenizer, text and task files; arguments are those of ``evaluate``.

        Raises:
            SecateurError: something is missing, or they do not fit each other.
        """
        choice = None
        if options.tasks:
            choice = TaskChoice.check(options.tasks, options.task_data, options.limit)
        texts = sum(source is not None for source in (options.text, options.dataset))
        if texts > 1 or (not texts and choice is None):
            raise SecateurError(
                "Evaluation needs either a text file or a data set, or else tasks; name one."
            )
        subject = Subject.find(model, trust_remote_code)
        rival = None if against is None else Subject.find(against, trust_remote_code)
        tokenizer = tokenizer or _common_tokenizer(subject, rival)
        passage = Passage.read(options, tokenizer) if texts else None
        for each in filter(None, (subject, rival)):
            each.check(passage, subject.vocabulary)
        return cls(subject, rival, tokenizer, passage, choice)


def fingerprint_evaluation(
    model: str | Path,
    options: EvaluationOptions,
    *,
    device: str = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check what ``evaluate`` would be given, and say all that decides its numbers.

    The model's weights, which decide them too, are left out.

    Raises:
        SecateurError: whatever ``evaluate`` would raise before it reads weights.
    """
    place = resolve_device(device)
    given = Inputs.check(model, options, trust_remote_code=trust_remote_code)
    passage, choice = given.passage, given.choice
    return {
        "text": passage and passage.text.sha256,
        "windows": passage and list(passage.windows_WL.shape),
        "bos": options.bos,
        "tasks": choice
        and {"data": choice.data, "limit": choice.limit, "lm_eval": lm_eval_version()},
        "forward": f"{resolve_dtype(dtype, place)} on {place.type}",
    }


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
    def read(cls, options: EvaluationOptions, tokenizer: PreTrainedTokenizerBase) -> Passage:
        """Read a text, tokenise it whole, without special tokens, and cut it.

        Raises:
            SecateurError: it cannot be read or is shorter than a window, or there is no token to
                begin windows with.
        """
        text = (
            read_dataset(str(options.dataset)) if options.text is None else read_text(options.text)
        )
        encoded = tokenizer(
            text.content, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        tokens_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        first = _bos_token(tokenizer) if options.bos else None
        windows_WL = split_windows(tokens_N, options.window, options.max_windows, first)
        return cls(text, len(tokens_N), windows_WL)

    @property
    def tokens_per_word(self) -> float:
        """Tokens of the whole text over its words."""
        return self.tokens / self.text.words


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, in memory or in a folder that has not been read yet."""

    name: str
    place: PreTrainedModel | Path
    config: PreTrainedConfig
    trust_remote_code: bool

    @classmethod
    def find(cls, model: str | Path | PreTrainedModel, trust_remote_code: bool) -> Subject:
        if isinstance(model, PreTrainedModel):
            name = model.config.name_or_path or type(model).__name__
            return cls(name, model, model.config, trust_remote_code)
        folder = find_folder(model)
        config = load_config(folder, trust_remote_code=trust_remote_code, use="load")
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


def _common_tokenizer(subject: Subject, rival: Subject | None) -> PreTrainedTokenizerBase:
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
