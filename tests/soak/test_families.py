"""Every family of docs/families.md, tried."""

from __future__ import annotations

import pytest

from families import every_family
from family_table import PAGE, row, try_apart

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("family", every_family())
def test_the_page_says_what_becomes_of_a_family(family: str) -> None:
    assert row(try_apart(family)) in PAGE.read_text("utf-8").splitlines()
