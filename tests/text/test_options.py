from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur.text.options import CalibrationOptions


def test_every_option_has_a_line_of_help() -> None:
    assert all(field.description for field in CalibrationOptions.model_fields.values())


@given(
    weights=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3), st.floats(0.01, 100), min_size=1, max_size=6
    ),
    samples=st.integers(4, 500),
)
def test_shares_add_up_and_miss_their_quota_by_less_than_one(
    weights: dict[str, float], samples: int
) -> None:
    shares = CalibrationOptions(source=weights, samples=samples).shares
    total = sum(weights.values())
    assert sum(shares.values()) == samples
    assert list(shares) == list(weights)
    for name, weight in weights.items():
        assert abs(shares[name] - samples * weight / total) < 1


def test_shares_go_to_the_largest_remainders() -> None:
    # Quotas 4.8, 3.2 and 2.0.
    options = CalibrationOptions(source={"a": 2.4, "b": 1.6, "c": 1.0}, samples=10)
    assert options.shares == {"a": 5, "b": 3, "c": 2}


def test_equal_remainders_go_to_the_source_named_first() -> None:
    assert CalibrationOptions(source={"b": 1, "a": 1}, samples=5).shares == {"b": 3, "a": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 3}, "3 samples are too few, a quarter is held out"),
        ({"length": 1}, "windows of 1 tokens are too short"),
        ({"samples": 10**12}, "too many; use at most 268,435,456 tokens in all"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"source": {}}, "a mix needs at least one source"),
        ({"source": " "}, "a source needs a name"),
        ({"source": {"a": 1, "b": 0}}, "the weight of b is 0"),
        ({"source": {"a": -1}}, "the weight of a is -1"),
        ({"source": {"a": float("nan")}}, "finite number"),
        ({"sample": 8}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options_say_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CalibrationOptions.model_validate(values)
