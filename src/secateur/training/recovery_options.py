"""What the user may say about recovery."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from secateur.methods.reconstruct import Reconstruct
from secateur.runs.options import put_over
from secateur.training.options import DistillationOptions, RunOptions, Training

# At their highest, where the user names none.
_LEARNING_RATES = {"lora": 1e-3, "full": 1e-4, "none": 1e-4}
_DISTILLATION = {"weight": 0.9, "temperature": 1.0, "top_k": 64}


class Recovery(RunOptions):
    """Everything that decides the result of recovery, apart from models and text."""

    noun: ClassVar[str] = "recovery options"

    blocks: Reconstruct | None = Field(
        default_factory=Reconstruct,
        description="fit each block to the dense model's hidden states first",
    )
    block_windows: int = Field(
        128,
        ge=2,
        le=2**24,
        description="windows of the training text for that, a quarter to measure on",
    )
    network: Literal["lora", "full", "none"] = Field(
        "lora", description="then train low-rank adapters, all parameters, or nothing"
    )
    rank: int = Field(32, ge=1, le=2**16, description="of the low-rank adapters")
    tokens: int = Field(
        262_144, ge=2, le=2**50, description="tokens to train the network on, at most once each"
    )
    length: int = Field(512, ge=2, le=2**24, description="tokens per window")
    batch_tokens: int = Field(4096, ge=2, le=2**28, description="tokens per step")
    learning_rate: float | None = Field(
        None, gt=0, le=1e3, description="at its highest; by default 1e-3 for lora, 1e-4 for full"
    )
    distillation: DistillationOptions = Field(
        default_factory=lambda: DistillationOptions.model_validate(_DISTILLATION),
        description="how the dense model takes part",
    )
    validations: int = Field(8, ge=1, le=10**6, description="how often they choose a checkpoint")

    @model_validator(mode="after")
    def _something_is_left_to_do(self) -> Recovery:
        if self.blocks is None and self.network == "none":
            raise ValueError("neither blocks nor the network are to be trained")
        if self.blocks is not None and self.blocks.reference != "dense":
            raise ValueError("blocks follow the dense model's hidden states; use reference: dense")
        if self.distillation.weight == 0:
            raise ValueError("without a weight of distillation the teacher says nothing")
        # What is said there of windows and steps holds here.
        _ = self.training
        return self

    @property
    def training(self) -> Training:
        """The same as options of training, with no mask to move."""
        network = self.network != "none"
        rate = self.learning_rate or _LEARNING_RATES[self.network]
        return Training.from_mapping(
            {
                "tokens": self.tokens if network else self.block_windows * self.length,
                "length": self.length,
                "batch_tokens": self.batch_tokens if network else self.length,
                "micro_batch_tokens": self.batch_tokens,
                "distillation": self.distillation.model_dump(),
                "optimiser": {"learning_rate": rate, "weight_decay": 0.0},
                "validations": self.validations,
                **self.model_dump(include=set(RunOptions.model_fields)),
            },
            "keep-mask",
        )

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """Validate plain values; what is not said of distillation is that of recovery.

        Raises:
            SecateurError: an unknown key or a bad value.
        """
        return super().from_mapping(put_over({"distillation": _DISTILLATION}, values))
