"""What the user may say about training, and the presets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from secateur.patterns.pattern import NM, PatternText
from secateur.runs.device import SAVE_DTYPE, DtypeName, SaveDtype
from secateur.runs.errors import SecateurError
from secateur.runs.options import LinearPatterns, Options, put_over
from secateur.text.beginning import BEGINNING, BeginningOption

LogTo = Literal["tensorboard"]
Mean = Annotated[float, Field(ge=0, lt=1)]


class MaskOptions(Options):
    """How masks move."""

    score: Literal["magnitude", "sensitivity"] = Field(
        "magnitude", description="|w|, or |w| times the root of the gradient's second moment"
    )
    scope: Literal["row", "global"] = Field(
        "row",
        description="where weights of an unstructured pattern compete, after the first mask",
    )
    refresh_steps: int = Field(
        10, ge=1, le=10**9, description="steps between two choices of the mask"
    )
    hysteresis: float = Field(
        0.0, ge=0, le=1e6, description="a weight comes back if its score is higher by this share"
    )
    forward: Literal["masked", "dense"] = Field(
        "masked",
        description="with the mask; or with all weights until it is frozen, while the decay draws "
        "removed ones to zero",
    )
    rescale: bool = Field(
        False, description="when masks are frozen, give each row its norm with removed weights"
    )
    frozen_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="last share of the steps, in which the mask stays; 1 keeps the mask of a "
        "pruned checkpoint, whatever its pattern",
    )


class DecayOptions(Options):
    """How removed weights are drawn to zero."""

    strength: float = Field(1e-4, ge=0, le=1e6, description="λ at its highest")
    ramp_share: float = Field(0.25, ge=0, le=1, description="share of the steps in which λ rises")
    place: Literal["inside", "outside"] = Field(
        "inside", description="of Adam's normalisation, or outside it"
    )
    norm: Literal["l2", "l1"] = Field(
        "l2", description="in proportion to the weight; or l1, by its absolute value, outside only"
    )

    @model_validator(mode="after")
    def _absolute_values_decay_outside(self) -> DecayOptions:
        if self.norm == "l1" and self.place == "inside":
            raise ValueError("the norm l1 needs place: outside")
        return self


class DistillationOptions(Options):
    """How the dense model takes part."""

    weight: float = Field(0.67, ge=0, le=1, description="of the divergence; the text gets the rest")
    temperature: float = Field(2.0, gt=0, le=1e6, description="of both models' probabilities")
    top_k: int | None = Field(
        None,
        ge=1,
        le=2**24,
        description="so many of the teacher's likeliest tokens are computed before training, and "
        "it leaves memory; null: all of them at every step",
    )


class LowRankOptions(Options):
    """SLoRB: dense low-rank products beside the sparse linears."""

    group: int = Field(16, ge=1, le=2**20, description="input columns per rank of the products")
    train_projection: bool = Field(True, description="train the sums of groups as well")
    start: Literal["means", "covariance"] = Field(
        "means",
        description="means of removed weights; or the product that is nearest to what the linear "
        "lacks of the dense one, for inputs such as those of the text",
    )


class OptimiserOptions(Options):
    """AdamW and its schedule."""

    learning_rate: float = Field(2e-4, gt=0, le=1e3, description="at its highest")
    warm_up: float = Field(0.05, ge=0, lt=1, description="share of the steps that rise")
    tail: float = Field(0.05, ge=0, lt=1, description="share of the steps that fall to zero")
    floor: float = Field(0.1, ge=0, le=1, description="share of the rate where the cosine ends")
    betas: tuple[Mean, Mean] = Field((0.9, 0.95), description="of the two running means")
    epsilon: float = Field(1e-8, gt=0, le=1e3, description="added to the root")
    weight_decay: float = Field(0.1, ge=0, le=1e6, description="of all matrices, decoupled")
    second_moment: Literal["update", "gradient"] = Field(
        "update", description="squares of the update, decay included, or of the gradient"
    )
    clip: float = Field(1.0, gt=0, le=1e9, description="largest norm of all gradients together")


class RunOptions(Options):
    """What training and recovery have in common."""

    seed: int = Field(0, ge=0, lt=2**47, description="decides the order of the text")
    bos: BeginningOption = Field(None, description=BEGINNING)
    validation_windows: int = Field(
        32, ge=1, le=2**24, description="windows that are not trained on"
    )
    checkpoint_minutes: float = Field(
        10.0, ge=0, le=1e6, description="between two states from which a killed run goes on"
    )
    log_to: LogTo | None = Field(
        None, description="tensorboard: the figures of the log as curves, in the work folder"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="dtype of forward passes")
    save_dtype: SaveDtype = Field("source", description=SAVE_DTYPE)


class Training(RunOptions):
    """Everything that decides the result of a run, apart from model, teacher and text."""

    noun: ClassVar[str] = "training options"

    pattern: PatternText = Field(NM(2, 4), description="n:m, or a sparsity such as 0.5")
    start: Literal["magnitude", "auto"] = Field(
        "magnitude",
        description="where a dense model begins: with its largest weights, or with masks and "
        "weights of the recipe auto of prune, which runs first",
    )
    only: LinearPatterns = Field((), description="linears to mask, by patterns of full names")
    skip: LinearPatterns = Field(
        (), description="linears to train without a mask, by patterns of full names"
    )
    tokens: int = Field(ge=1, le=2**50, description="tokens to train on, at most once each")
    length: int = Field(1024, ge=2, le=2**24, description="tokens per window")
    batch_tokens: int = Field(131_072, ge=2, le=2**40, description="tokens per step")
    micro_batch_tokens: int = Field(
        4096, ge=2, le=2**28, description="tokens in one forward pass, at least a window"
    )
    train: Literal["all", "vectors", "lora"] = Field(
        "all",
        description="all parameters; or, where the mask is kept, norm gains and biases alone, or "
        "low-rank changes of the kept weights alone",
    )
    lora_rank: int = Field(16, ge=1, le=2**16, description="of the changes, with train: lora")
    masks: MaskOptions = Field(default_factory=MaskOptions)
    decay: DecayOptions = Field(default_factory=DecayOptions)
    distillation: DistillationOptions = Field(default_factory=DistillationOptions)
    low_rank: LowRankOptions | None = Field(None, description="SLoRB; null for a strict pattern")
    optimiser: OptimiserOptions = Field(default_factory=OptimiserOptions)
    validations: int = Field(
        10, ge=1, le=10**6, description="how often held-out windows are looked at"
    )
    activation_checkpointing: bool = Field(
        False, description="run each block again on the way back instead of keeping what it made"
    )
    reduce_every_pass: bool = Field(
        False,
        description="of several processes: add up gradients after every forward pass, not once a "
        "step; less memory, more traffic",
    )

    @model_validator(mode="before")
    @classmethod
    def _dual_variables_are_gone(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "admm" not in values:
            return values
        if values["admm"] is not None:
            raise ValueError(
                "admm, ELSA's dual variable, was removed; use masks: {scope: global, score: "
                "sensitivity}, which choose by the same threshold"
            )
        # Reports of earlier versions write out every option.
        return {name: value for name, value in values.items() if name != "admm"}

    @model_validator(mode="after")
    def _batches_hold_windows(self) -> Training:
        if self.batch_tokens < self.length:
            raise ValueError(
                f"a step of {self.batch_tokens} tokens holds no window of {self.length}"
            )
        if self.steps < 1:
            raise ValueError(f"{self.tokens} tokens are less than one step of {self.step_tokens}")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Training:
        if self.train != "all" and not self.keeps_mask:
            raise ValueError(
                f"train: {self.train} leaves the removed weights as they are, and masks nothing "
                "to follow; use the preset keep-mask, or train: all"
            )
        if self.start == "auto" and self.keeps_mask:
            raise ValueError(
                "start: auto prunes a dense model, and a frozen share of 1 keeps the mask that is "
                "there; leave one of them out"
            )
        if self.masks.scope == "global" and isinstance(self.pattern, NM):
            raise ValueError(
                f"weights of {self.pattern} compete within their group; give a sparsity as "
                "pattern, or leave masks.scope at row"
            )
        dense = self.masks.forward == "dense"
        if (dense or self.masks.rescale) and not 0 < self.masks.frozen_share < 1:
            raise ValueError(
                "a dense forward and rescaling end with the freezing of masks; give a frozen_share "
                "between 0 and 1"
            )
        if dense and self.low_rank is not None:
            raise ValueError("a low-rank boost stands in for removed weights; use forward: masked")
        return self

    @property
    def step_windows(self) -> int:
        """Windows in a step."""
        return self.batch_tokens // self.length

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.step_windows * self.length

    @property
    def micro_batch_windows(self) -> int:
        """Windows in one forward pass."""
        return max(1, self.micro_batch_tokens // self.length)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.tokens // self.step_tokens

    @property
    def keeps_mask(self) -> bool:
        """The mask is frozen from the first step on."""
        return self.masks.frozen_share == 1

    @property
    def starts_by_covariance(self) -> bool:
        """Whether low-rank products begin with what the model lacks of the dense one."""
        return self.low_rank is not None and self.low_rank.start == "covariance"

    @property
    def frozen_from(self) -> int:
        """The step from which on the masks stay."""
        return round((1 - self.masks.frozen_share) * self.steps)

    @classmethod
    def from_mapping(cls, values: dict[str, Any], preset: str = "default") -> Self:
        """A preset with values, nested ones too, put over it.

        Raises:
            SecateurError: there is no such preset, key or value.
        """
        if preset not in PRESETS:
            raise SecateurError(f"There is no preset {preset}; presets are {', '.join(PRESETS)}.")
        return super().from_mapping(put_over(PRESETS[preset], values))


PRESETS: dict[str, dict[str, Any]] = {
    # For budgets of some hundred small steps from a good one-shot mask.
    "default": {
        "start": "auto",
        "batch_tokens": 4096,
        "masks": {"score": "sensitivity", "hysteresis": 0.1, "frozen_share": 0.5},
        "decay": {"strength": 0.0, "place": "outside"},
        "distillation": {"top_k": 64},
        "optimiser": {"second_moment": "gradient", "learning_rate": 3e-4, "weight_decay": 0.0},
    },
    # Every default is that of the GPT-2 recipe of AST.
    "ast": {},
    # The mask of a pruned checkpoint stays, so nothing is left to decay.
    "keep-mask": {
        "masks": {"frozen_share": 1.0},
        "optimiser": {"second_moment": "gradient"},
        "decay": {"strength": 0.0, "place": "outside"},
    },
}
"""Values put over the defaults, by name."""
