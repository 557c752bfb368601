"""Plots as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.report.svg import Axis, Series, count_axis, draw, fit_axis

SVG = "{http://www.w3.org/2000/svg}"
X = Axis("", 0.0, 60.0, [0, 30, 60])
Y = Axis("", 0.0, 1.2, [0, 0.6, 1.2])


def drawn(*series: Series, x: Axis = X, y: Axis = Y) -> ElementTree.Element:
    return ElementTree.fromstring(draw("a plot", series, x, y))


def places(line: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]


def test_points_lie_where_their_numbers_say() -> None:
    plot = drawn(
        Series("line", [(0, 0), (30, 0.6), (60, 1.2)]),
        Series("dots", [(30, 0.6), (10, 99)], kind="loose"),
    )
    (line,) = plot.findall(f"{SVG}polyline")
    first, middle, last = places(line)
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1]
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    (dot,) = [dot for dot in plot.findall(f"{SVG}circle") if "loose" in dot.attrib["class"]]
    assert (float(dot.attrib["cx"]), float(dot.attrib["cy"])) == middle
    assert [title.text for title in dot] == ["dots: 30, 0.6"]


def test_a_missing_point_interrupts_the_line() -> None:
    plot = drawn(Series("", [(0, 0), (10, 0.5), (20, None), (30, 0.5), (40, 0)]))
    assert [len(places(line)) for line in plot.findall(f"{SVG}polyline")] == [2, 2]


def test_a_level_goes_through_and_has_its_name() -> None:
    plot = drawn(Series("dense", [(0, 0.6)], kind="level"))
    assert [path for path in plot.findall(f"{SVG}path") if path.attrib["class"] == "level"]
    assert "dense" in [text.text for text in plot.findall(f"{SVG}text")]


def test_long_lines_have_no_dots_and_single_points_have() -> None:
    many = [(float(at), 0.5) for at in range(1000)]
    x = count_axis("", 999)
    assert not drawn(Series("", many), x=x).findall(f"{SVG}circle")
    assert drawn(Series("", [(7, 0.5)]), x=x).findall(f"{SVG}circle")


def test_texts_are_escaped() -> None:
    text = draw('a < b & "c"', [Series("<d>", [(0, 0)])], Axis("<x>", 0, 1, [0]), Y, alone=True)
    plot = ElementTree.fromstring(text)
    assert plot.attrib["aria-label"] == 'a < b & "c"'
    assert {"<x>", 'a < b & "c"'} <= {each.text for each in plot.findall(f"{SVG}text")}


numbers = st.floats(-1e99, 1e99, allow_nan=False)


@given(st.lists(numbers, min_size=1), st.booleans(), st.floats(0, 10))
def test_axes_have_few_round_numbers_around_all_values(
    values: list[float], zero: bool, least: float
) -> None:
    axis = fit_axis("", values, zero=zero, least=least)
    assert 2 <= len(axis.ticks) <= 8
    assert all(one <= other for one, other in pairwise(axis.ticks))
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    draw("", [Series("", [(0.0, value) for value in values])], X, axis)


def test_axes_are_round() -> None:
    assert fit_axis("", [0.013, 0.041], zero=True).ticks == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    half = fit_axis("", [0.5, 0.5], least=0.1, within=(0, 1), percent=True, ticks=2)
    assert [half.text(tick) for tick in half.ticks] == ["45\u202f%", "50\u202f%", "55\u202f%"]
    assert fit_axis("", [1.0], least=0.1, within=(0, 1)).high == 1
    assert fit_axis("", []).ticks


@pytest.mark.parametrize("last", [0, 1, 2, 7, 29, 125, 20_000])
def test_counts_are_whole(last: int) -> None:
    axis = count_axis("block", last)
    assert axis.high == max(last, 1)
    assert len(axis.ticks) <= 7
    assert all(tick == int(tick) <= last for tick in axis.ticks)
    assert list(count_axis("block", last, ends=True).ticks) == sorted({0, last})
