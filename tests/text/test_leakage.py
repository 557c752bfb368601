from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.text.leakage import Leakage, find_leakage

TEXT = " ".join(f"word{index}" for index in range(100))


@given(
    calibration=st.lists(st.lists(st.sampled_from("ab"), max_size=12), max_size=4),
    evaluation=st.lists(st.sampled_from("abc"), max_size=30),
    words=st.integers(1, 4),
)
def test_spans_are_counted_as_by_hand(
    calibration: list[list[str]], evaluation: list[str], words: int
) -> None:
    def spans(text: list[str]) -> list[tuple[str, ...]]:
        return [tuple(text[i : i + words]) for i in range(len(text) - words + 1)]

    known = set(spans(evaluation))
    all_spans = [span for text in calibration for span in spans(text)]
    found = find_leakage([" ".join(text) for text in calibration], " ".join(evaluation), words)
    assert found == Leakage(words, len(all_spans), sum(span in known for span in all_spans))


def test_case_and_punctuation_do_not_matter() -> None:
    leakage = find_leakage(["The CAT, sat -- on a mat!"], "the cat sat\n\non a mat", words=6)
    assert (leakage.spans, leakage.shared) == (1, 1)


def test_unrelated_texts_share_nothing() -> None:
    leakage = find_leakage([" ".join(f"other{i}" for i in range(100))], TEXT)
    assert (leakage.spans, leakage.shared, leakage.warning) == (88, 0, None)


def test_a_copied_passage_is_warned_of() -> None:
    passage = " ".join(TEXT.split()[20:60])
    leakage = find_leakage(["Before it. " + passage, "nothing here"], TEXT)
    assert leakage.shared == 40 - 12
    assert leakage.warning is not None
    assert leakage.warning.startswith("93.3% of the 13-word spans of the calibration text")


def test_a_phrase_among_many_spans_is_no_leak() -> None:
    assert Leakage(13, 10_000, 10).warning is None
    assert Leakage(13, 10_000, 11).warning is not None


@pytest.mark.parametrize("calibration", [[], ["", "a few words"]])
def test_texts_shorter_than_a_span(calibration: list[str]) -> None:
    leakage = find_leakage(calibration, TEXT)
    assert (leakage.spans, leakage.share, leakage.warning) == (0, 0.0, None)
