"""What a page consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class KeyFigure:
    """A number that matters.

    Attributes:
        label: what it is.
        value: the number with its unit.
        beside: what it has to be held against.
        protocol: how it was measured; figures of other protocols are not comparable.
    """

    label: str
    value: str
    beside: str = ""
    protocol: str = ""


@dataclass(frozen=True)
class KeyFigures:
    """The numbers that matter most."""

    shape: ClassVar[str] = "figures"
    entries: Sequence[KeyFigure]


@dataclass(frozen=True)
class Definitions:
    """Terms and what they are here."""

    shape: ClassVar[str] = "definitions"
    title: str
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first cell of a row names it.

    Attributes:
        title: what it shows.
        head: of the columns.
        rows: as many cells each.
        caption: how its numbers were made.
        style: ``numbers``, to the right and unbroken; ``compared``, which may break; ``words``,
            sentences.
        folded: shown when asked for.
    """

    shape: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    style: str = "numbers"
    folded: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot for wide pages, and the same for narrow ones if that is another."""

    name: str
    wide: Markup
    narrow: Markup | None = None


@dataclass(frozen=True)
class Plots:
    """Plots that share a legend and a caption.

    Attributes:
        title: what they show.
        size: ``full``: one below the other; ``half`` and ``small``: side by side.
        panels: the plots.
        caption: how to read them.
        legend: names of series and the numbers of their colours; none if there is one series.
    """

    shape: ClassVar[str] = "plots"
    title: str
    size: str
    panels: Sequence[Panel]
    caption: str
    legend: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Lines:
    """Short texts one below the other, folded if there are many."""

    shape: ClassVar[str] = "lines"
    title: str
    entries: Sequence[str]
    folded: bool = False


@dataclass(frozen=True)
class Continuation:
    """How two models go on with a text.

    Attributes:
        prompt: the text.
        common: what both write at first.
        dense: the rest of the dense model.
        pruned: the rest of the pruned model.
    """

    prompt: str
    common: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Continuations:
    """Several texts and how a dense and a pruned model go on with them."""

    shape: ClassVar[str] = "continuations"
    title: str
    entries: Sequence[Continuation]
    caption: str


Part = KeyFigures | Definitions | Table | Plots | Lines | Continuations


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    parts: Sequence[Part]
