"""Plots as texts of SVG, alone or inside a page whose style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from secateur.report.format import percent_text

Point = tuple[float, float | None]

# Colours and dashes that differ from each other; more series than that begin again.
SHADES = 6
_TEXT = 12
_TICKS = 5
_FINEST = 1e-9
# A character is about so wide, a share of its height.
_CHARACTER = 0.58
# Points closer than this have no dots of their own.
_DOT_GAP = 5.0
# What a file of its own has and a page has already.
_TITLE_HEIGHT = 32
_STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.title{font-size:14px;fill:#111}"
    ".grid{stroke:#ddd}.line{fill:none;stroke:#0f766e;stroke-width:2}"
    ".dot{fill:#0f766e}.loose{fill:#999}</style>"
)


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: what they are.
        points: in the order of x; a y of None interrupts the line.
        shade: number of the colour, from 0.
        kind: a line; a thin line that stays behind the others; points without a line; or a level,
            a dashed line through the whole plot at the height of the first point, with its name.
    """

    name: str
    points: Sequence[Point]
    shade: int = 0
    kind: Literal["line", "faint", "loose", "level"] = "line"


@dataclass(frozen=True)
class Axis:
    """From where to where, and which rising numbers stand there, as shares in percent."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    percent: bool = False

    def text(self, value: float) -> str:
        """The number as it stands at the axis."""
        return percent_text(value) if self.percent else f"{value:,.6g}"

    def share(self, value: float) -> float:
        """Where on the axis a number lies: 0 at its beginning, 1 at its end."""
        return (value - self.low) / (self.high - self.low or 1.0)


def fit_axis(
    label: str,
    values: Sequence[float],
    *,
    zero: bool = False,
    least: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
    percent: bool = False,
    ticks: int = _TICKS,
) -> Axis:
    """An axis of round numbers around all values.

    Args:
        label: what is plotted.
        values: finite numbers.
        zero: begin at zero or below.
        least: the shortest the axis may be, unless ``within`` says otherwise.
        within: numbers that make sense; others are not reached.
        percent: the numbers are shares, shown in percent.
        ticks: at most so many steps between them.
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # Shorter axes than that would have the same number on all ticks.
    least = max(least, _FINEST * max(abs(low), abs(high)))
    short = max(0.0, least - (high - low))
    low, high = (min(max(end, within[0]), within[1]) for end in (low - short / 2, high + short / 2))
    step = _round_step((high - low) / ticks or max(abs(high) / ticks, 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    numbers = [round(step * at, digits) for at in range(first, max(last, first + 1) + 1)]
    return Axis(label, numbers[0], numbers[-1], numbers, percent)


def count_axis(label: str, last: int, *, ends: bool = False) -> Axis:
    """An axis of whole numbers from 0 to ``last``, with round ones on it or its ends alone."""
    step = last if ends else int(_round_step(last / _TICKS)) if last else 1
    ticks = [float(at) for at in range(0, last + 1, step or 1)]
    return Axis(label, 0.0, float(max(last, 1)), ticks)


def draw(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    width: int = 720,
    height: int = 260,
    *,
    alone: bool = False,
) -> str:
    """Draw series on two axes.

    Everything that has a colour has a class instead: ``grid``, ``level`` and its ``name``,
    ``line``, ``dot`` and ``loose``, the last three with ``s0`` to ``s5`` for the shade.

    Args:
        title: what a reader who does not see the plot is told.
        series: drawn in their order; what lies outside the axes is left out.
        x: the axis below.
        y: the axis beside, its label above it.
        width: of the plot in pixels of its text.
        height: the same.
        alone: as a file of its own, with a style, a background and the title on top.
    """
    frame = _Frame(x, y, width, height)
    parts = list(frame.axes())
    # What is behind is drawn first.
    for each in sorted(series, key=lambda each: each.kind == "line"):
        parts += frame.level(each) if each.kind == "level" else frame.series(each)
    above = 0
    if alone:
        above = _TITLE_HEIGHT
        background = f'<rect y="{-above}" width="100%" height="100%" fill="white"/>'
        heading = f'<text class="title" x="4" y="-12">{escape(title)}</text>'
        parts = [_STYLE, background, heading, *parts]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 {-above} {width} {height + above}" '
        f'width="{width}" height="{height + above}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


class _Frame:
    """The rectangle between the axes."""

    def __init__(self, x: Axis, y: Axis, width: int, height: int) -> None:
        self.x, self.y = x, y
        numbers = max((len(y.text(tick)) for tick in y.ticks), default=0)
        last = len(x.text(x.ticks[-1])) if x.ticks else 0
        self.left = numbers * _TEXT * _CHARACTER + 10
        self.right = width - max(8.0, last * _TEXT * _CHARACTER / 2)
        # A label stands above the axis, where it needs no turned letters.
        self.top = 30.0 if y.label else 10.0
        self.bottom = height - (40.0 if x.label else 22.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            round(self.left + (self.right - self.left) * self.x.share(x), 1),
            round(self.bottom - (self.bottom - self.top) * self.y.share(y), 1),
        )

    def axes(self) -> Iterator[str]:
        for tick in self.y.ticks:
            _, at = self.place(self.x.low, tick)
            yield f'<path class="grid" d="M{self.left:.1f} {at}H{self.right:.1f}"/>'
            yield _text(self.left - 6, at + 4, self.y.text(tick), "end")
        for tick in self.x.ticks:
            at, _ = self.place(tick, self.y.low)
            yield f'<path class="grid" d="M{at} {self.bottom:.1f}v4"/>'
            yield _text(at, self.bottom + 17, self.x.text(tick), "middle")
        if self.y.label:
            yield _text(0, 12, self.y.label, "start")
        if self.x.label:
            yield _text(self.right, self.bottom + 35, self.x.label, "end")

    def level(self, series: Series) -> Iterator[str]:
        for _, y in series.points[:1]:
            if y is not None and 0 <= self.y.share(y) <= 1:
                _, at = self.place(self.x.low, y)
                yield f'<path class="level" d="M{self.left:.1f} {at}H{self.right:.1f}"/>'
                yield _text(self.right, at - 5, series.name, "end", "name")

    def series(self, series: Series) -> Iterator[str]:
        shade, is_line = f"s{series.shade % SHADES}", series.kind == "line"
        pieces = list(self._pieces(series))
        if series.kind != "loose":
            style = "line" if is_line else "line faint"
            for piece in pieces:
                places = " ".join("{},{}".format(*self.place(*point)) for point in piece)
                yield f'<polyline class="{style} {shade}" points="{places}"/>'
        points = [point for piece in pieces for point in piece]
        # Without a neighbour there is no line to see.
        alone = all(len(piece) == 1 for piece in pieces)
        crowded = (self.right - self.left) / max(1, len(points)) < _DOT_GAP
        if series.kind == "faint" or (is_line and crowded and not alone):
            return
        style, radius = "dot" if is_line else "loose", 4 if alone and is_line else 2.5
        for x, y in points:
            cx, cy = self.place(x, y)
            exact = percent_text(y, 2) if self.y.percent else f"{y:.4g}"
            name = escape(f"{series.name}: {self.x.text(x)}, {exact}")
            yield (
                f'<circle class="{style} {shade}" cx="{cx}" cy="{cy}" r="{radius}">'
                f"<title>{name}</title></circle>"
            )

    def _pieces(self, series: Series) -> Iterator[list[tuple[float, float]]]:
        """Points between interruptions."""
        piece: list[tuple[float, float]] = []
        for x, y in series.points:
            if y is not None and _inside(self.x.share(x)) and _inside(self.y.share(y)):
                piece.append((x, y))
            elif piece:
                yield piece
                piece = []
        if piece:
            yield piece


def _inside(share: float) -> bool:
    return -1e-9 <= share <= 1 + 1e-9


def _round_step(least: float) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that is so long."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return float(next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9)))


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
