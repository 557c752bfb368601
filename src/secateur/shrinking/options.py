"""What the user may say about shrinking."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from secateur.runs.device import SAVE_DTYPE, DtypeName, SaveDtype
from secateur.runs.errors import SecateurError
from secateur.runs.options import LinearPatterns, Options
from secateur.text.options import CalibrationOptions

Form = Literal["uneven", "uniform", "padded"]
Prior = Literal["wanda", "magnitude", "fluctuation", "random"]
# Utilities are solved for in a matrix of as many rows and columns.
_MOST_SUB_MODELS = 10_000


class ShrinkOptions(Options):
    """Everything that decides the result of shrinking, apart from the model itself."""

    noun: ClassVar[str] = "shrink options"

    sparsity: float = Field(
        0.5, gt=0, lt=1, description="share of the parameters of all blocks to remove"
    )
    preset: Literal["default", "paper"] = Field(
        "default", description="how units are chosen; paper is Bonsai as published"
    )
    form: Form = Field("uneven", description="how the smaller model is stored")
    ffn_only: bool = Field(False, description="leave attention as it is")
    only: LinearPatterns = Field(
        (),
        description="linears that may be cut, where their attention or feed-forward has no "
        "others, by patterns of full names",
    )
    skip: LinearPatterns = Field(
        (),
        description="linears whose attention or feed-forward keeps all its units, by patterns of "
        "full names such as model.layers.0.*",
    )
    whole_groups: bool = Field(
        False, description="key-value groups that stay keep all their query heads"
    )
    grid: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="feed-forwards keep multiples of this many channels, or all; by default the "
        "largest of 256, 128, 64 and 32 that leaves six widths, and that removes no more than 2 % "
        "too much if widths are uniform",
    )
    budget: Literal["parameters", "latency"] = Field(
        "parameters",
        description="what the share is of: parameters of the blocks, or the time that they take on "
        "this machine for a window of text",
    )
    sub_models: int = Field(
        96,
        ge=8,
        le=_MOST_SUB_MODELS,
        description="sub-models of random widths that are tried",
    )
    trial_tokens: int = Field(
        2048, ge=2, le=2**28, description="tokens that a sub-model is tried on, at least a window"
    )
    batch_tokens: int = Field(
        4096, ge=2, le=2**28, description="tokens in one forward pass, at least a window"
    )
    step: float = Field(0.05, gt=0, lt=1, description="paper: largest share that one round removes")
    masks: int = Field(
        200, ge=2, le=_MOST_SUB_MODELS, description="paper: sub-models that a round tries"
    )
    prior: Prior = Field("wanda", description="paper: what decides which units may go in a round")
    calibration: CalibrationOptions = Field(
        default_factory=CalibrationOptions,
        description="text; with the preset paper anew in each round",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of weights and forward passes")
    save_dtype: SaveDtype = Field("source", description=SAVE_DTYPE)

    _own: ClassVar[dict[str, set[str]]] = {
        "default": {"whole_groups", "grid", "budget", "sub_models", "trial_tokens", "batch_tokens"},
        "paper": {"step", "masks", "prior"},
    }

    @model_validator(mode="before")
    @classmethod
    def _rounds_are_short(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "paper":
            return values
        given = values.get("calibration", {})
        if isinstance(given, dict):
            values = {**values, "calibration": {"samples": 32, **given}}
        return values

    @model_validator(mode="after")
    def _options_are_of_the_preset(self) -> ShrinkOptions:
        for preset, names in self._own.items():
            if preset != self.preset and (foreign := sorted(names & self.model_fields_set)):
                raise SecateurError(
                    f"The option {foreign[0]} of shrinking belongs to the preset {preset}; name "
                    "that preset or leave the option out."
                )
        return self

    @model_validator(mode="after")
    def _time_needs_widths_to_choose(self) -> ShrinkOptions:
        if self.budget == "latency" and self.form != "uneven":
            raise SecateurError(
                "A budget of latency chooses a width for each block; leave out --uniform and "
                "--padded, or count parameters."
            )
        return self


def round_shares(sparsity: float, step: float) -> list[float]:
    """Share of the goal that is reached after each round, when one removes at most ``step``."""
    rounds = max(1, math.ceil(sparsity / step - 1e-9))
    return [min(1.0, (number + 1) * step / sparsity) for number in range(rounds - 1)] + [1.0]
