"""Plots as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from secateur.report.plot import line_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_where_their_numbers_say() -> None:
    drawn = ElementTree.fromstring(
        line_plot("a < b", "x", "y", [(0, 0), (30, 0.6), (60, 1.2)], [(30, 0.6), (10, 99)])
    )
    (line,) = drawn.findall(f"{SVG}polyline")
    first, middle, last = (
        tuple(map(float, point.split(","))) for point in line.attrib["points"].split()
    )
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1]
    assert middle[0] == (first[0] + last[0]) / 2
    (dot,) = drawn.findall(f"{SVG}circle")
    assert (float(dot.attrib["cx"]), float(dot.attrib["cy"])) == middle
    texts = [each.text for each in drawn.findall(f"{SVG}text")]
    assert {"a < b", "60", "1.2"} <= set(texts)


def test_a_line_at_zero_has_axes() -> None:
    ElementTree.fromstring(line_plot("", "", "", [(0, 0), (1, 0)]))
