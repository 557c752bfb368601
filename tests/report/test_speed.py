"""What was measured, on a page and in the terminal."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from report.benches import a_bench
from secateur.report.documents.evaluation import Evaluation
from secateur.report.page import write_report
from secateur.report.run_files import read_runs
from secateur.report.speed import bench_table, measured_figures, side_by_side
from secateur.report.tables import speed_table


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_page_shows_what_was_measured_in_place_of_what_was_expected(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(runs["small"], folder)
    before = write_report(folder).read_text()
    assert "What is expected to run faster" in before
    assert "What runs faster" not in before
    for name in ("bench.json", "bench-small-Q8.json"):
        (folder / "secateur" / name).write_text(a_bench().model_dump_json())
    after = write_report(folder).read_text()
    assert "What is expected to run faster" not in after
    for text in ("What runs faster", "1.250", "1.240 – 1.260", "medians of processor time",
                 "This is made up.", "decode, times faster"):  # fmt: skip
        assert text in after
    card = (folder / "README.md").read_text()
    assert "1.240 – 1.260" in card
    assert "Nothing here was measured" not in card
    (run,) = read_runs([folder])
    assert speed_table(run) is None
    assert [each.value for each in measured_figures(run)] == ["1.25"] * 4


def test_the_terminal_says_each_kind_of_work_once() -> None:
    said = shown(bench_table(a_bench("[red]small")))
    assert said.count("decode 1 × 64") == 1
    # What a file is called is no markup.
    assert "[red]small" in said
    assert "160.0" in said
    assert "threads 1; llama.cpp xllamacpp 1" in said


def test_dense_and_result_stand_side_by_side(runs: dict[str, Path]) -> None:
    evaluation = Evaluation.model_validate_json(
        (runs["ramp"] / "secateur" / "evaluation.json").read_text()
    )
    said = shown(side_by_side(evaluation, a_bench()))
    for words in ("perplexity", "KL from dense", "top-1", "50 MB", "40 MB", "1.25", "128.0"):
        assert words in said
