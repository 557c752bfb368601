"""What every stage of a recipe has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from pydantic import Field

from secateur.blocks.tasks import BlockTask, DenseTask, GroupTask, Needs, Reference
from secateur.patterns.pattern import NM, Pattern
from secateur.runs.options import Options


class Stage(Options, ABC):
    """Options of one step of a recipe."""

    method: str

    # Where a stage may stand in a recipe, which knows none of them by name.
    comes_first: ClassVar[bool] = False
    """Nothing may come before it."""
    chooses_mask: ClassVar[bool] = True
    """It needs no mask of a stage before it."""
    keeps_mask: ClassVar[bool] = False
    """Whatever mask it finds, it leaves."""
    prunes_nothing: ClassVar[bool] = False
    """The mask that it chooses is the checkpoint's own, and has to stay."""
    comes_last: ClassVar[bool] = False
    """Nothing may come behind it but a stage that follows it."""
    follows: ClassVar[str | None] = None
    """The method that must stand right before it."""

    unstructured_only: ClassVar[bool] = False

    repeats: ClassVar[tuple[str, ...]] = ()
    """Options that say how often it does the same work."""

    def scaled(self, divisor: int) -> Self:
        """The stage that takes 1/d² of the memory where all sizes of model and text are 1/d.

        It repeats nothing more than twice: memory does not grow with that.
        """
        return self.model_copy(update={name: min(getattr(self, name), 2) for name in self.repeats})

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError if the stage cannot give masks this pattern."""
        if self.unstructured_only and isinstance(pattern, NM):
            raise ValueError(
                f"{self.method} moves zeros between rows, which the pattern {pattern} "
                "does not allow; choose another method or a sparsity"
            )


class GroupStage(Stage):
    """A step that takes the linears of one input after the other."""

    needs: ClassVar[Needs] = "nothing"
    works_blind: ClassVar[bool] = False
    """Does its work where no calibration token arrived."""

    def wants_dense_inputs(self, pattern: Pattern) -> bool:
        """Whether, as the only stage, it takes all statistics of a block while that is dense."""
        return False

    @abstractmethod
    def apply(self, task: GroupTask) -> None:
        """Change the task's weights and, if the stage chooses one, its mask."""


class DenseStage(Stage):
    """A step that readies a dense block for pruning and leaves what it computes as it is."""

    comes_first: ClassVar[bool] = True
    chooses_mask: ClassVar[bool] = False
    batch_sequences: ClassVar[int] = 1

    def step_size(self, sequences: int) -> int:
        """Calibration windows that it runs the block on at a time."""
        return self.batch_sequences

    @abstractmethod
    def apply(self, task: DenseTask) -> None:
        """Change the dense weights and what is known of their inputs."""


class BlockStage(Stage):
    """A step that works on a block as a whole, against a reference output."""

    needs_norms: ClassVar[bool] = False

    reference: Reference = Field(
        "pruned",
        description="what the block should return: the dense block's output on the pruned stream, "
        "or that of the dense model",
    )
    batch_sequences: int = Field(4, ge=1, le=2**20, description="calibration windows in one step")

    def step_size(self, sequences: int) -> int:
        """Windows in one step where there are this many fitted sequences."""
        return min(self.batch_sequences, sequences)

    @abstractmethod
    def apply(self, task: BlockTask) -> None:
        """Change the block's weights and, if the stage chooses them, its masks."""

    @abstractmethod
    def passes(self, sequences: int) -> float:
        """Work, in forward passes over this many fitted sequences; backward counts as two."""
