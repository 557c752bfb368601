"""The recipe: what to do to a model, as a file, as flags or in Python."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from secateur.allocation import AnyAllocation, Loss, Uniform
from secateur.methods import STAGES, AnyStage, Stage
from secateur.methods.admm import ADMM
from secateur.methods.besa_rates import BESARates
from secateur.methods.quantize import Quantize
from secateur.methods.reconstruct import Reconstruct
from secateur.methods.refit import Refit
from secateur.methods.wanda import Wanda
from secateur.models.formats import FormatName
from secateur.models.formats.format import WeightFormat, find_format
from secateur.patterns.pattern import NM, Pattern, PatternText, Unstructured, read_pattern
from secateur.runs.device import SAVE_DTYPE, DtypeName, SaveDtype
from secateur.runs.options import LinearPatterns, Options
from secateur.text.options import CalibrationOptions, fitted_share


def automatic_stages(pattern: Pattern) -> tuple[AnyStage, ...]:
    """The stages that lost least for their time in the benchmark of block methods.

    Rates of rows first, where the pattern lets them differ; then mask and weights within each
    row's rate; then the block as a whole.
    """
    if isinstance(pattern, NM):
        return (ADMM(), Reconstruct())
    return (BESARates(), ADMM(), Reconstruct())


def automatic_allocation(pattern: Pattern) -> AnyAllocation:
    """How zeros are divided between the blocks: by their effect on the final loss, where it may.

    The stages divide a block's zeros again, so that only the totals of the blocks count.
    """
    loss = Loss()
    if isinstance(pattern, NM) or not 0 < pattern.sparsity <= loss.max_sparsity:
        return Uniform()
    return loss


class Recipe(Options):
    """Everything that decides the result of a run, apart from the model itself."""

    noun: ClassVar[str] = "recipe"

    pattern: PatternText = Field(
        Unstructured(0.5), description="a sparsity such as 0.5, or n:m (keep n of every m)"
    )
    stages: tuple[AnyStage, ...] = Field(
        default=(Wanda(), Refit()),
        max_length=32,
        description="what is done to each block, in order; auto takes what lost least in trials",
    )
    allocation: AnyAllocation = Field(
        default=Uniform(), description="how the zeros are divided among linears"
    )
    only: LinearPatterns = Field((), description="linears to work on, by patterns of full names")
    skip: LinearPatterns = Field(
        (), description="linears to leave as they are, by patterns of full names such as *.o_proj"
    )
    calibration: CalibrationOptions = Field(
        default_factory=CalibrationOptions, description="the text that statistics come from"
    )
    format: FormatName | None = Field(
        None,
        description="how linears are saved; as quantize says, and plain without it, if not given",
    )
    held_out: int | None = Field(
        None,
        ge=1,
        le=2**28,
        description="calibration windows that nothing is fitted on, to measure on; a quarter of "
        "them if not given",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of forward passes")
    save_dtype: SaveDtype = Field("source", description=SAVE_DTYPE)
    batch_tokens: int = Field(
        4096, ge=1, le=2**28, description="tokens in one forward pass, at least a window"
    )
    activation_memory: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="GB that hidden states may take before they go to a mapped file",
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_out_auto(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("stages") == "auto":
            pattern = read_pattern(values.get("pattern", Unstructured(0.5)))
            stages, allocation = automatic_stages(pattern), automatic_allocation(pattern)
            return {"allocation": allocation, **values, "stages": stages}
        return values

    @model_validator(mode="before")
    @classmethod
    def _keeping_prunes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "pattern" in values:
            return values
        stages = values.get("stages")
        first = stages[0] if isinstance(stages, list | tuple) and stages else None
        method = first.get("method") if isinstance(first, dict) else getattr(first, "method", None)
        stage = STAGES.get(str(method))
        return {**values, "pattern": "0.0"} if stage and stage.prunes_nothing else values

    @field_validator("stages")
    @classmethod
    def _stages_are_in_order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for stage in stages[1:]:
            if stage.comes_first:
                raise ValueError(f"{stage.method} changes the dense model and must come first")
        pruning = stages[1:] if stages and stages[0].comes_first else stages
        if not pruning or not pruning[0].chooses_mask:
            first = f"not {pruning[0].method}" if pruning else "but there is none"
            choices = ", ".join(name for name, stage in STAGES.items() if stage.chooses_mask)
            raise ValueError(f"the first stage must choose a mask ({choices}), {first}")
        for before, stage in itertools.pairwise(pruning):
            if before.comes_last and stage.follows != before.method:
                raise ValueError(
                    f"{stage.method} would change what {before.method} leaves; put "
                    f"{before.method} last"
                )
            if stage.follows not in (None, before.method):
                raise ValueError(
                    f"{stage.method} works on what {stage.follows} leaves; put {stage.follows} "
                    f"before it, and {stage.method} right behind it"
                )
            if pruning[0].prunes_nothing and not stage.keeps_mask:
                raise ValueError(
                    f"{stage.method} changes the mask that {pruning[0].method} is to keep"
                )
        return stages

    @model_validator(mode="after")
    def _pattern_can_be_met(self) -> Recipe:
        for stage in self.stages:
            stage.check_pattern(self.pattern)
        return self

    @model_validator(mode="after")
    def _some_windows_are_fitted(self) -> Recipe:
        if self.fitted_windows < 1:
            raise ValueError(
                f"held_out is {self.held_out} of {self.calibration.samples} samples; leave at "
                "least one to fit on"
            )
        return self

    @model_validator(mode="after")
    def _kept_zeros_are_where_they_are(self) -> Recipe:
        if self.keeps_masks and not isinstance(self.allocation, Uniform):
            raise ValueError("keep leaves no zeros to divide; leave the allocation out")
        return self

    @model_validator(mode="after")
    def _format_holds_the_weights(self) -> Recipe:
        _ = self.weight_format
        return self

    @property
    def fitted_windows(self) -> int:
        """Calibration windows that methods fit to; the held-out ones come behind them."""
        samples = self.calibration.samples
        return fitted_share(samples) if self.held_out is None else samples - self.held_out

    @property
    def keeps_masks(self) -> bool:
        """Whether the masks are those of the checkpoint."""
        return any(stage.prunes_nothing for stage in self.stages)

    @property
    def quantize(self) -> Quantize | None:
        """The stage that quantises, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Quantize)), None)

    @property
    def weight_format(self) -> WeightFormat:
        """What the linears look like in the files."""
        stage = self.quantize
        if stage is None:
            return find_format(self.format or "plain").of(None)
        return find_format(self.format or stage.format).of(stage.grid)
