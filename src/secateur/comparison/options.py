"""What is compared: the content of the file."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from secateur.evaluation.options import EvaluationOptions
from secateur.runs.device import DtypeName
from secateur.runs.options import Options
from secateur.text.options import CalibrationOptions

# A row with a list of these is a row for each.
SEVERAL = ("pattern", "sparsity")


class RowOptions(Options):
    """What makes one checkpoint: a command of ours with its options, or a script."""

    model_config = ConfigDict(extra="allow")

    command: Literal["prune", "shrink", "train", "recover"] = Field(
        "prune", description="what makes the checkpoint; its options stand beside it"
    )
    script: tuple[str | int | float, ...] | None = Field(
        None, min_length=1, description="words of a process that leaves a checkpoint in {output}"
    )
    start: str | None = Field(
        None,
        alias="from",
        description="the row whose checkpoint is worked on, instead of the model",
    )
    repeats: int | None = Field(None, ge=1, le=10_000, description="how often it runs")

    @property
    def own(self) -> dict[str, Any]:
        """The options of the command."""
        return dict(self.model_extra or {})


class ComparisonEvaluation(EvaluationOptions):
    """What all models are evaluated on, and how."""

    dtype: DtypeName | None = Field(
        None, description="of matrix products; as the rows have it if null"
    )


class Comparison(Options):
    """The content of a comparison file."""

    noun: ClassVar[str] = "comparison"

    model: str = Field(description="checkpoint folder, hub id or GGUF file")
    calibration: CalibrationOptions = Field(
        default_factory=CalibrationOptions, description="the text that statistics come from"
    )
    evaluation: ComparisonEvaluation
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of forward passes")
    trust_remote_code: bool = Field(False, description="let the checkpoint's own code run")
    repeats: int = Field(
        1, ge=1, le=10_000, description="how often each row runs, in turn, unless it says so itself"
    )
    yardstick: str | None = Field(
        None, description="the row that the time of the others is divided by"
    )
    rows: dict[str, RowOptions] = Field(
        min_length=1,
        description="what to compare, by name; a list of patterns or sparsities is a row for each",
    )

    @field_validator("rows", mode="before")
    @classmethod
    def _spell_out_lists(cls, rows: Any) -> Any:
        if not isinstance(rows, dict):
            return rows
        spelled: dict[str, Any] = {}
        for name, row in rows.items():
            own = row if isinstance(row, dict) else {}
            lists = [key for key in SEVERAL if isinstance(own.get(key), list)]
            for key in lists:
                spelled |= {f"{name}, {value}": {**own, key: value} for value in own[key]}
            if not lists:
                spelled[name] = row
        return spelled

    @field_validator("evaluation")
    @classmethod
    def _one_text(cls, evaluation: ComparisonEvaluation) -> ComparisonEvaluation:
        if (evaluation.text is None) == (evaluation.dataset is None):
            raise ValueError("give either a text file or a dataset")
        return evaluation
