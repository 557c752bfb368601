"""The files of the benchmarks can be run, and the tables of the docs are what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from record import read, table
from secateur.comparison.options import Comparison
from secateur.pruning.recipe import Recipe
from secateur.shrinking.options import ShrinkOptions

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_rows_have_options_that_their_commands_take(file: Path) -> None:
    for name, row in Comparison.from_file(file).rows.items():
        if row.script is not None:
            script = next(word for word in map(str, row.script) if word.endswith(".py"))
            assert Path(script.format(folder=BENCHMARKS)).is_file(), name
        elif row.command == "prune":
            Recipe.from_mapping(row.own)
        elif row.command == "shrink":
            ShrinkOptions.from_mapping(row.own)


def test_the_table_of_block_methods_is_that_of_the_results() -> None:
    shown = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table(read(BENCHMARKS / "results" / "block_methods.jsonl")) in shown


def test_benchmarks_stay_small() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in BENCHMARKS.rglob("*.py"))
    assert lines <= 1500
