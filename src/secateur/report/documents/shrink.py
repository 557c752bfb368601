"""What ``shrink`` reports: a smaller model, or the curve of all sizes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from secateur.models.inspection import FormatFit
from secateur.report.documents.run import Document, RunReport


class SubBlockReport(BaseModel):
    """One attention or feed-forward, and why it has the width it has."""

    block: int
    kind: str = Field(description="attention or ffn")
    kept: int = Field(description="key-value groups with their query heads, or channels")
    of: int
    queries: int | None = Field(
        None, description="query heads in each kept group; null for a feed-forward"
    )
    queries_of: int | None = Field(None, description="query heads in each group of the dense model")
    parameters: int = Field(description="that the kept units hold")
    removed_by_round: list[int] = Field([], description="of the paper's preset")
    coefficients: list[float | None] = Field(
        [],
        description="by round, the mean of the utility per parameter that regression found in the "
        "units that went: nats per token and parameter, the lower the sooner a unit goes",
    )
    local_loss: float | None = Field(
        None,
        description="squared change of the dense sub-block's output at this width, over the "
        "typical square of the hidden states it is added to",
    )
    penalty: float | None = Field(
        None, description="divergence that this width is expected to cause, nats per token"
    )
    next_penalty: float | None = Field(
        None, description="the same of the next narrower width that may be chosen"
    )
    held_out_error: float | None = Field(
        None, description="squared change of its output over its squared output, held-out tokens"
    )
    error_without_refit: float | None = Field(
        None, description="the same with the kept columns of the output matrix as they were"
    )


class RoundReport(BaseModel):
    """One round."""

    share: float = Field(description="parameters gone after it, of all in the blocks")
    loss: float = Field(description="of the model before it, nats per token on the round's text")
    utility_mean: float = Field(description="mean log-likelihood of its sub-models, finite ones")
    utility_deviation: float = Field(description="their standard deviation")
    not_finite: int = Field(description="sub-models whose log-likelihood was NaN or infinite")
    seconds: float


class SurveyReport(BaseModel):
    """The sub-models that widths were chosen by."""

    sub_models: int
    tokens: int = Field(description="that each of them was tried on")
    divergence_mean: float = Field(
        description="KL from the dense model in nats per token, mean over finite ones"
    )
    divergence_deviation: float = Field(description="their standard deviation")
    not_finite: int
    explained: float | None = Field(
        description="share of the variance of their divergences that a fit to the others foretells"
    )
    predicted_divergence: float = Field(description="sum of the penalties of the chosen widths")


class LatencyReport(BaseModel):
    """Time of a forward pass through the blocks on the machine of the run, in seconds."""

    tokens: int = Field(description="in the window that was timed")
    before: float
    expected: float = Field(description="with the chosen widths, by the times that chose them")


class ParameterReport(BaseModel):
    """Parameters, counted in the files."""

    model_before: int
    model_after: int
    blocks_before: int
    blocks_after: int
    target: float
    removed: float = Field(description="share of the parameters of all blocks that is gone")


class FormatReport(FormatFit):
    """How many linears have a shape that a quantised format of some runtime holds."""

    fit_dense: int = Field(description="of as many linears of the dense model")


class ShrinkReport(RunReport):
    """Everything about a finished run."""

    options: dict[str, Any]
    calibration: dict[str, Any]
    parameters: ParameterReport
    sub_blocks: list[SubBlockReport]
    rounds: list[RoundReport] = Field(description="of the paper's preset")
    survey: SurveyReport | None = Field(description="of the default preset without --uniform")
    latency: LatencyReport | None = Field(
        None, description="where the target is a share of the time"
    )
    formats: list[FormatReport] = Field([], description="quantised formats that the shapes fit")
    forward_tokens: int = Field(description="tokens that went through the model or a sub-model")
    resumed: int = Field(
        description="rounds, or blocks, that an earlier, interrupted session finished"
    )


class CurvePoint(BaseModel):
    """One size."""

    target: float = Field(description="share of the parameters of all blocks to remove")
    removed: float = Field(description="share that the widths remove")
    blocks_after: int = Field(description="parameters left in the blocks")
    divergence: float = Field(description="expected KL from the dense model, nats per token")
    widths: dict[str, int] = Field(description="units kept, by sub-block")
    queries: dict[str, int] = Field(
        {}, description="query heads in each kept group, of attentions where some are gone"
    )


class TriedSubModel(BaseModel):
    """A sub-model that the curve was learned from."""

    removed: float
    divergence: float | None = Field(description="measured; null if it was not finite")


class SizeCurve(Document):
    """Everything about a curve."""

    options: dict[str, Any]
    calibration: dict[str, Any]
    blocks_before: int
    points: list[CurvePoint]
    sub_models: list[TriedSubModel]
    survey: SurveyReport = Field(
        description="how the sub-models did; what is predicted is for the last point"
    )
    forward_tokens: int
    seconds: float
