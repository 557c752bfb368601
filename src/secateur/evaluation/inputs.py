"""Find and check what an evaluation is given, before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.tasks import TaskChoice, lm_eval_version
from secateur.evaluation.text import Passage
from secateur.models.checkpoint import check_loads
from secateur.models.locate import find_folder, load_model, load_tokenizer
from secateur.models.structure import embedding_rows, positions_of, vocabulary_size
from secateur.runs.device import DtypeName, resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent
from secateur.text.encoder import Encoder


@dataclass(frozen=True)
class Inputs:
    """What an evaluation is given: models, their encoder, a text, and tasks."""

    model: GivenModel
    dense: GivenModel | None
    encoder: Encoder
    passage: Passage | None
    choice: TaskChoice | None

    @classmethod
    def check(
        cls,
        model: str | Path | PreTrainedModel,
        options: EvaluationOptions,
        against: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        progress: Progress = silent,
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
        found = GivenModel.find(model, trust_remote_code, progress)
        dense = None if against is None else GivenModel.find(against, trust_remote_code, progress)
        for each in filter(None, (found, dense)):
            each.check_fits(options.window if texts else 0, found.vocabulary)
        tokenizer = tokenizer or _common_tokenizer(found, dense)
        encoder = Encoder.of(tokenizer, options.bos, found.vocabulary)
        passage = Passage.read(options, encoder) if texts else None
        return cls(found, dense, encoder, passage, choice)


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
        "bos": given.encoder.bos,
        "tasks": choice
        and {"data": choice.data, "limit": choice.limit, "lm_eval": lm_eval_version()},
        "forward": f"{resolve_dtype(dtype, place)} on {place.type}",
    }


@dataclass(frozen=True)
class GivenModel:
    """A model in memory, or in a folder whose weights have not been read yet."""

    name: str
    place: PreTrainedModel | Path
    config: PreTrainedConfig
    trust_remote_code: bool

    @classmethod
    def find(
        cls,
        model: str | Path | PreTrainedModel,
        trust_remote_code: bool,
        progress: Progress = silent,
    ) -> GivenModel:
        """Find a model, and hold the headers of its files against its configuration.

        Raises:
            SecateurError: it is not there, a file is damaged or outside its folder, or a tensor is
                missing.
        """
        if isinstance(model, PreTrainedModel):
            name = model.config.name_or_path or type(model).__name__
            return cls(name, model, model.config, trust_remote_code)
        folder = find_folder(model, progress)
        config = check_loads(folder, trust_remote_code=trust_remote_code)
        return cls(str(model), folder, config, trust_remote_code)

    @property
    def vocabulary(self) -> int | None:
        if isinstance(self.place, PreTrainedModel):
            return embedding_rows(self.place)
        return vocabulary_size(self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if isinstance(self.place, PreTrainedModel):
            return None
        return load_tokenizer(self.place, trust_remote_code=self.trust_remote_code)

    def check_fits(self, window: int, vocabulary: int | None) -> None:
        """Raise SecateurError if windows or vocabulary are not for this model."""
        if self.vocabulary != vocabulary:
            raise SecateurError(
                f"{self.name} has a vocabulary of {self.vocabulary} tokens and the evaluated model "
                f"one of {vocabulary}; compare a model with the dense one it was made from."
            )
        positions = positions_of(self.config)
        if positions is not None and window > positions:
            raise SecateurError(
                f"Evaluation windows of {window} tokens are longer than the {positions} positions "
                f"of {self.name}; use a window of {positions} or less."
            )

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Read the weights onto a device, in a dtype or in that of the files.

        Raises:
            SecateurError: the files cannot be read or lack a tensor.
        """
        if isinstance(self.place, PreTrainedModel):
            return self.place
        return load_model(
            self.place, dtype or "auto", device, trust_remote_code=self.trust_remote_code
        )


def _common_tokenizer(model: GivenModel, dense: GivenModel | None) -> PreTrainedTokenizerBase:
    tokenizer = model.tokenizer()
    other = None if dense is None else dense.tokenizer()
    if tokenizer is None:
        raise SecateurError(
            f"Evaluating {model.name} in memory needs its tokenizer; pass tokenizer=."
        )
    if dense is not None and other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise SecateurError(
            f"{model.name} and {dense.name} have different tokenizers, so their predictions "
            "cannot be compared; name the dense model it was made from."
        )
    return tokenizer
