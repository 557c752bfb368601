"""What an evaluation ends with, each number with the protocol it rests on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from secateur.text.beginning import Beginning, read_beginning

Interval = tuple[float, float]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Protocol(_Frozen):
    """How the numbers of an evaluation were made."""

    text: str = Field(description="file name, or name, configuration and split of a data set")
    text_sha256: str = Field(description="of the text in UTF-8, as far as it was read")
    text_tokens: int = Field(description="tokens of the text, as far as it was read")
    text_words: int = Field(description="words of it, separated by white space")
    tokenizer: str = Field(description="what the tokenizer belongs to")
    bos: Annotated[Beginning, BeforeValidator(read_beginning)] = Field(
        description="where the beginning-of-text token stands: window, text or none"
    )
    window: int = Field(description="tokens per window; windows do not overlap")
    windows: int = Field(description="windows used")
    predicted_tokens: int = Field(description="window - 1 positions of each window")
    forward_dtype: str = Field(description="of matrix products; softmax and loss are fp32")
    device: str


class Figures(_Frozen):
    """How well one model predicts the text."""

    model: str
    weights_dtype: str
    loss: float = Field(description="mean negative log-likelihood per token in nats")
    perplexity: float = Field(description="per token, exp of the loss")
    interval: Interval | None = Field(
        description="95 % interval of the perplexity, windows resampled; null for fewer than 8"
    )
    word_perplexity: float | None = Field(
        description="per word, exp(loss x tokens / words); null where white space parts no words"
    )


class Divergence(_Frozen):
    """How far a model is from the dense one."""

    kl: float = Field(description="mean KL(dense || model) per predicted token in nats")
    kl_interval: Interval | None = Field(description="95 %, windows resampled")
    top1_agreement: float = Field(description="share of positions with the same likeliest token")


class Difference(_Frozen):
    """Dense minus model on the same windows: negative where the model is worse."""

    loss: float = Field(description="in nats per token")
    loss_interval: Interval | None = Field(description="95 %, windows resampled in pairs")
    perplexity: float
    perplexity_interval: Interval | None = Field(description="95 %, from the same resamples")


class TaskScore(_Frozen):
    """One task."""

    items: int = Field(description="questions evaluated")
    acc: float = Field(description="share of questions whose likeliest choice is right")
    acc_stderr: float | None = Field(description="standard error; null for a single question")
    acc_norm: float | None = Field(
        description="the same with log-likelihoods divided by characters; null if lm-eval's task "
        "has none"
    )
    acc_norm_stderr: float | None


class TaskScores(_Frozen):
    """All tasks for one model."""

    model: str
    tasks: dict[str, TaskScore]
    mean_acc: float = Field(description="mean of acc over tasks, each counting the same")
    mean_acc_stderr: float | None


class ZeroShot(_Frozen):
    """Tasks without examples in the prompt."""

    model: TaskScores
    dense: TaskScores | None = Field(None, description="the model evaluated against")
    lm_eval: str = Field(description="version, whose prompts and metrics these are")
    data: dict[str, str] = Field(description="per task: hub, or fingerprint of the local file")
    bos: Beginning | None = Field(
        None, description="none if prompts begin without a beginning-of-text token"
    )
    limit: int | None = Field(description="questions per task, the first of them; null for all")
    forward_dtype: str
    seconds: float


class Evaluation(_Frozen):
    """What ``evaluate`` returns; ``model_dump(mode="json")`` is what ``--json`` prints."""

    schema_version: int = 1
    model: Figures | None = Field(None, description="with a text only")
    dense: Figures | None = Field(None, description="the model evaluated against")
    divergence: Divergence | None = Field(None, description="with a dense model only")
    difference: Difference | None = Field(None, description="with a dense model only")
    protocol: Protocol | None = Field(None, description="with a text only")
    zero_shot: ZeroShot | None = Field(None, description="with tasks only")
    seconds: float = Field(description="wall time of the forward passes over the text")
    notes: list[str] = Field(default_factory=list, description="what to know before quoting this")
