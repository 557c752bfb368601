"""Intervals of medians, held against every way in which values can fall."""

from __future__ import annotations

from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.deploy.bench.statistics import median_interval, pairwise_ratios, relative_width

times = st.floats(1e-6, 1e6)


def coverage(count: int, left_out: int) -> float:
    """How often the true median lies within, by all patterns of values above and below it."""
    held = [
        left_out < sum(below) < count - left_out or left_out == sum(below) == 0 == count
        for below in product((0, 1), repeat=count)
    ]
    return sum(held) / len(held)


@pytest.mark.parametrize("count", range(1, 15))
def test_the_interval_is_the_narrowest_that_is_sure_enough(count: int) -> None:
    _, low, high = median_interval(range(count))
    left_out = int(low)
    assert high == count - 1 - left_out
    # The range is all that a few values can give.
    assert left_out == 0 or coverage(count, left_out) >= 0.95
    if low < high - 2:
        assert coverage(count, left_out + 1) < 0.95


@given(st.lists(times, min_size=1, max_size=40), st.randoms())
def test_an_interval_holds_its_median_and_knows_no_order(values: list[float], draw: object) -> None:
    middle, low, high = median_interval(values)
    assert middle == median(values)
    assert low <= middle <= high
    assert low in values
    assert high in values
    draw.shuffle(values)  # type: ignore[attr-defined]
    assert median_interval(values) == (middle, low, high)


@given(st.lists(st.tuples(times, times), min_size=1), st.floats(0.1, 10))
def test_ratios_are_of_the_same_turn(pairs: list[tuple[float, float]], factor: float) -> None:
    base, other = map(list, zip(*pairs, strict=True))
    ratios = pairwise_ratios(base, other)
    assert ratios == [first / second for first, second in pairs]
    # What slows both in a turn is in no ratio.
    slowed = pairwise_ratios([factor * each for each in base], [factor * each for each in other])
    assert slowed == pytest.approx(ratios)


def test_what_is_always_the_same_has_no_width() -> None:
    assert relative_width([2.0] * 7) == 0
    assert relative_width([1.0, 2.0, 3.0]) == 0.5
