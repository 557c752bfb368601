"""The parts a page consists of; the template knows each by the name of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


class Part:
    """Something below the heading of a section."""

    @property
    def shape(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class KeyFigure:
    """A number that matters, and what it has to be held against.

    Figures of different protocols are not comparable.
    """

    label: str
    value: str
    beside: str = ""
    protocol: str = ""


@dataclass(frozen=True)
class KeyFigures(Part):
    """The numbers that matter most."""

    entries: Sequence[KeyFigure]


@dataclass(frozen=True)
class Definitions(Part):
    """Terms and what they are here."""

    title: str
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table(Part):
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
class Plots(Part):
    """Plots that share a caption and a legend, which names series and numbers their colours.

    Plots of size ``full`` stand one below the other, ``half`` and ``small`` ones side by side.
    """

    title: str
    size: str
    panels: Sequence[Panel]
    caption: str
    legend: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Lines(Part):
    """Short texts one below the other, folded if there are many."""

    title: str
    entries: Sequence[str]
    folded: bool = False


@dataclass(frozen=True)
class Continuation:
    """A text, what two models both write at first, and the rest of each."""

    prompt: str
    common: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Continuations(Part):
    """Several texts and how a dense and a pruned model go on with them."""

    title: str
    entries: Sequence[Continuation]
    caption: str
