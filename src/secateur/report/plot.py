"""A small plot as a text of SVG, which browsers and documents show as it is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 48
_TICKS = 6

Point = tuple[float, float]


def line_plot(
    title: str, x_label: str, y_label: str, line: Sequence[Point], dots: Sequence[Point] = ()
) -> str:
    """Draw a line and dots on axes that begin at zero.

    Args:
        title: above the plot.
        x_label: below it.
        y_label: beside it.
        line: points joined in their order, with no negative number.
        dots: single points; those above the line's range are left out.
    """
    x_step = _round_step(max(x for x, _ in line))
    y_step = _round_step(max(y for _, y in line))
    x_most, y_most = _TICKS * x_step, _TICKS * y_step

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * point[0] / x_most
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * point[1] / y_most
        return round(x, 1), round(y, 1)

    parts = [_text(_WIDTH / 2, 20, title), _text(_WIDTH / 2, _HEIGHT - 8, x_label)]
    middle = _HEIGHT / 2
    parts.append(_text(14, middle, y_label, f' transform="rotate(-90 14 {middle})"'))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in range(_TICKS + 1):
        x, y = place((tick * x_step, tick * y_step))
        parts.append(f'<path d="M{x} {bottom}V{_TOP}M{_LEFT} {y}H{right}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 16, f"{tick * x_step:g}"))
        parts.append(_text(_LEFT - 6, y + 4, f"{tick * y_step:.3g}", ' text-anchor="end"'))
    for dot in dots:
        if dot[0] <= x_most and dot[1] <= y_most:
            x, y = place(dot)
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="#999"/>')
    points = " ".join(f"{x},{y}" for x, y in map(place, line))
    parts.append(f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" text-anchor="middle">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _round_step(most: float) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that reaches so far."""
    power = 1e-9
    while True:
        for factor in (1, 2, 5):
            if factor * power * _TICKS >= most:
                return float(f"{factor * power:.6g}")
        power *= 10


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}"{more}>{escape(text)}</text>'
