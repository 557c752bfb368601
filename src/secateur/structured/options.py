"""What the user may say about shrinking."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.calibration import CalibrationOptions
from secateur.errors import SecateurError
from secateur.structured.export import Form
from secateur.structured.priors import Prior
from secateur.walk.precision import DtypeName


class ShrinkOptions(BaseModel):
    """Everything that decides the result of shrinking, apart from the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(
        0.5, gt=0, lt=1, description="share of the parameters of all blocks to remove"
    )
    preset: Literal["paper"] = Field("paper", description="how units are chosen")
    form: Form = Field("uneven", description="how the smaller model is stored")
    ffn_only: bool = Field(False, description="leave attention as it is")
    step: float = Field(0.05, gt=0, lt=1, description="largest share that one round removes")
    masks: int = Field(200, ge=2, description="sub-models that a round tries")
    prior: Prior = Field("wanda", description="what decides which units may go in a round")
    calibration: CalibrationOptions = Field(
        default_factory=lambda: CalibrationOptions(samples=32),
        description="the text that sub-models are tried on; samples are for each round",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of weights and forward passes")

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> ShrinkOptions:
        """Validate plain values.

        Raises:
            SecateurError: an unknown key or a bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        raise SecateurError(f"The option {place} of shrinking is not valid: {message}.")
