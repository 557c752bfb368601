"""What every stage of a recipe has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from secateur.methods.task import GroupTask
from secateur.walk.inputs import Needs


class Stage(BaseModel, ABC):
    """Options of one step of a recipe, and the step itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[Needs] = "nothing"
    chooses_mask: ClassVar[bool] = True

    @abstractmethod
    def apply(self, task: GroupTask) -> None:
        """Change the task's weights and, if the stage chooses one, its mask."""
