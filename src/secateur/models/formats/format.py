"""What a weight format answers, and what it is asked about."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from secateur.models.formats import FORMATS
from secateur.models.structure import BlockList
from secateur.patterns.pattern import Pattern
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import GridOptions, QuantizedSolution

WEIGHT = "weight"


@dataclass(frozen=True)
class Stored:
    """A tensor of the files without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FinishedLinear:
    """A linear that is to be saved.

    Attributes:
        weight_OI: its weights, rounded to ``dtype``; zero where the mask is False.
        dtype: what the weights have to be when they are read again.
        mask_OI: bool, True = kept; None if no mask was chosen.
        quantised: the weights as levels of a grid; None if they are on none.
    """

    weight_OI: Tensor
    dtype: torch.dtype
    mask_OI: Tensor | None = None
    quantised: QuantizedSolution | None = None


class WeightFormat(ABC):
    """How the linears of a model's blocks are stored; all other tensors are stored as they are.

    A weight that is read again equals the one that was saved, number for number: resuming a run and
    counting zeros in the files rest on that. What loses precision is an export, not a format.

    Attributes:
        name: what messages call the format; a user may have more names for it.
        pieces: last parts of the names of the tensors that stand in the files for ``NAME.weight``,
            such as ``weight_packed``; none if it is stored under its own name.
        package: a package that reading and writing need, and what to install to have it.
        loads: whether transformers opens a checkpoint in this format.
        otherwise: what a user can do where the format has no place for a model.
    """

    name: ClassVar[str]
    pieces: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[tuple[str, str] | None] = None
    loads: ClassVar[bool] = True
    otherwise: ClassVar[str] = "use the format plain"

    @classmethod
    def of(cls, grid: GridOptions | None) -> Self:
        """Return the format for weights on a grid, or on none.

        Raises:
            SecateurError: it cannot hold them.
        """
        return cls()

    @classmethod
    @abstractmethod
    def recognise(cls, described: Mapping[str, Any]) -> Self | None:
        """Return the format if a ``quantization_config``, empty if there is none, speaks of it."""

    @abstractmethod
    def describe(self, blocks: BlockList) -> dict[str, Any]:
        """Return the ``quantization_config`` of a checkpoint in this format, empty for none."""

    @abstractmethod
    def layout(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, Stored]:
        """Return the tensors of a linear by piece.

        Args:
            shape: of the weight, (out, in).
            dtype: of the weight.
            kept: number of weights that the mask keeps.
        """

    @abstractmethod
    def encode(self, linear: FinishedLinear) -> dict[str, Tensor]:
        """Return the tensors of a linear by piece, as ``layout`` has them."""

    @abstractmethod
    def decode(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (out, in) from its tensors by piece, which ``weight`` has seen.

        Raises:
            ValueError: their values do not fit each other; a phrase says which.
        """

    @abstractmethod
    def weight(self, stored: Mapping[str, Stored], read: Callable[[str], Tensor]) -> Stored:
        """Return shape and dtype of a weight from its tensors in the files.

        Args:
            stored: the tensors that are there, by piece.
            read: gives the values of a piece.

        Raises:
            ValueError: pieces are missing or do not fit each other; a phrase says which.
        """

    def find(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Name of each weight that is stored in pieces -> piece -> its name in the files."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            for piece in self.pieces:
                if name.endswith(f".{piece}"):
                    found.setdefault(name.removesuffix(piece) + WEIGHT, {})[piece] = name
        return found

    def check(self, blocks: BlockList, pattern: Pattern, whole: str | None = None) -> None:
        """Find out before any work what the format has no place for.

        Args:
            blocks: of the model.
            pattern: what the masks will look like.
            whole: why linears are no tensors of their own in the files, None if they are.

        Raises:
            SecateurError: the model, or a linear of it, cannot be saved in this format.
        """
        if whole is not None:
            raise SecateurError(
                f"The format {self.name} needs a checkpoint whose files hold each linear as a "
                f"tensor of its own, which this model does not have: {whole}; {self.otherwise}."
            )
        self.require_package()
        for index, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                if parameter.ndim > 2:
                    raise self._no_place(f"{blocks.name(index)}.{name}", "stacks experts")
            for linear in blocks.linears(index):
                if linear.transposed:
                    name = f"{blocks.name(index)}.{linear.name}"
                    raise self._no_place(name, "is stored as (in, out)")

    def require_package(self) -> None:
        """Raise SecateurError if the package of the format is not installed."""
        if self.package is not None:
            package, install = self.package
            if find_spec(package.replace("-", "_")) is None:
                raise SecateurError(
                    f"Weights in the format {self.name} need the package {package}; "
                    f"install {install}."
                )

    def _no_place(self, name: str, why: str) -> SecateurError:
        return SecateurError(
            f"The format {self.name} does not take {name}, which {why}; {self.otherwise}."
        )


def find_format(name: str) -> type[WeightFormat]:
    """Return the registered format of this name."""
    module, _, kind = FORMATS[name].partition(".")
    found: type[WeightFormat] = getattr(import_module(f"secateur.models.formats.{module}"), kind)
    return found


def recognise(described: Any) -> WeightFormat | None:
    """Return the format that a ``quantization_config`` speaks of, None if it is not known."""
    if not isinstance(described, dict | None):
        return None
    found = (find_format(name).recognise(described or {}) for name in FORMATS)
    return next((each for each in found if each is not None), None)


def stored_name(weight: str, piece: str) -> str:
    """Name in the files of a piece of the weight that is called ``weight``."""
    return weight.removesuffix(WEIGHT) + piece


def require(stored: Mapping[str, Stored], expected: Mapping[str, Stored]) -> None:
    """Raise ValueError with a phrase unless all expected pieces are there as expected."""
    for piece, wanted in expected.items():
        found = stored.get(piece)
        if found is None:
            raise ValueError(f"its {piece} is missing")
        if found != wanted:
            raise ValueError(f"its {piece} is {_described(found)} instead of {_described(wanted)}")


def _described(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
