"""What is generated from the option models is what is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

import generate


def test_the_command_line_reads_what_the_models_say() -> None:
    assert generate.DESCRIBED.read_text(encoding="utf-8") == generate.described(), (
        "run python docs/generate.py"
    )


@pytest.mark.parametrize("path", generate.PAGES, ids=lambda path: path.stem)
def test_reference_pages_say_what_the_models_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == generate.page(text), "run python docs/generate.py"
    assert text.count("<!-- from the models: ") == text.count("<!-- end -->") > 0
