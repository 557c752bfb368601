"""What is compared: the file, and what its check says."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from secateur.evaluation.inputs import fingerprint_evaluation
from secateur.evaluation.options import EvaluationOptions
from secateur.models.locate import locate_checkpoint
from secateur.pruning.job import fingerprint_run
from secateur.pruning.recipe import Recipe
from secateur.runs.device import DtypeName, resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.machine import describe_machine
from secateur.runs.options import Options
from secateur.text.options import CalibrationOptions

DENSE = "dense"
# What the rows have in common and may not say themselves.
_SHARED = ("calibration", "device", "dtype")


class Comparison(Options):
    """The content of a comparison file."""

    noun: ClassVar[str] = "comparison"

    model: str = Field(description="checkpoint folder, hub id or GGUF file")
    calibration: CalibrationOptions = Field(
        default_factory=CalibrationOptions, description="the text that statistics come from"
    )
    evaluation: EvaluationOptions
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of forward passes")
    trust_remote_code: bool = Field(False, description="let the checkpoint's own code run")
    rows: dict[str, dict[str, Any]] = Field(min_length=1, description="recipes by name")

    @field_validator("evaluation")
    @classmethod
    def _one_text(cls, evaluation: EvaluationOptions) -> EvaluationOptions:
        if (evaluation.text is None) == (evaluation.dataset is None):
            raise ValueError("give either a text file or a dataset")
        return evaluation

    def recipe(self, name: str) -> Recipe:
        """The complete recipe of a row.

        Raises:
            SecateurError: it is not valid, or speaks of what all rows share.
        """
        values = self.rows[name]
        if own := [key for key in _SHARED if key in values]:
            raise SecateurError(
                f"it has {own[0]} of its own, which all rows share; move it to the top of the file."
            )
        shared = self.model_dump(mode="json", include=set(_SHARED))
        return Recipe.from_mapping({**values, **shared})


@dataclass(frozen=True)
class CheckedRow:
    """A recipe that can run.

    Attributes:
        name: as the file has it.
        folder: name of its folder, the same for the same result.
        recipe: complete, as YAML; None for the dense model.
    """

    name: str
    folder: str
    recipe: str | None


@dataclass(frozen=True)
class Checked:
    """A comparison that can run, in plain values.

    Attributes:
        model: local folder of the dense model.
        evaluation: fingerprint of the evaluation, which does not hang on the row.
        rows: the dense model, then the recipes in their order.
    """

    model: str
    options: dict[str, Any]
    evaluation: str
    rows: list[CheckedRow]
    machine: dict[str, Any]


def check(file: Path) -> Checked:
    """Find out all that is wrong before anything runs.

    Raises:
        SecateurError: the file, the model, a row or the evaluation cannot be used.
    """
    comparison = Comparison.from_file(file)
    model, remote = comparison.model, comparison.trust_remote_code
    rows: list[CheckedRow] = []
    for name in comparison.rows:
        if name == DENSE:
            raise SecateurError(
                f"The row {DENSE} is always there, for the model itself; name yours otherwise."
            )
        try:
            recipe = comparison.recipe(name)
            decides = fingerprint_run(model, recipe, trust_remote_code=remote)
        except SecateurError as error:
            raise SecateurError(f"The row {name} cannot run: {error}") from error
        rows.append(CheckedRow(name, _folder_name(name, decides), recipe.to_yaml()))
    dense = {key: decides[key] for key in ("model", "versions")}
    evaluated = fingerprint_evaluation(
        model,
        comparison.evaluation,
        device=comparison.device,
        dtype=comparison.dtype,
        trust_remote_code=remote,
    )
    options = comparison.model_dump(mode="json", exclude={"rows"})
    folder = locate_checkpoint(model, trust_remote_code=remote)
    return Checked(
        model=str(folder),
        options=options,
        evaluation=_digest({**dense, **evaluated}),
        rows=[CheckedRow(DENSE, _folder_name(DENSE, dense), None), *rows],
        machine=describe_machine(resolve_device(comparison.device)).model_dump(mode="json"),
    )


def _folder_name(name: str, decides: dict[str, Any]) -> str:
    plain = re.sub(r"[^\w.+@-]+", "-", name)
    return f"{plain}-{_digest(decides)}"


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
