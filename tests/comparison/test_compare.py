"""Rows run once, in an order that survives interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from secateur.comparison import ComparisonResult, compare
from secateur.comparison.table import comparison_markdown, comparison_table
from secateur.runs.errors import SecateurError
from secateur.runs.processes import Measured

Edit = Callable[..., Path]


def test_one_table_of_all_rows(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    file = edit(tasks=["piqa"], task_data=str(tmp_path), limit=2)
    result = compare(file, tmp_path / "out")
    assert [row.name for row in result.rows] == ["dense", "magnitude", "wanda 2:4"]
    dense, magnitude, wanda = result.rows
    assert dense.pruned is None and dense.evaluation["divergence"] is None
    assert magnitude.pruned is not None and wanda.pruned is not None
    assert wanda.pruned.sparsity == 0.5
    assert not wanda.pruned.resumed
    assert wanda.size_bytes > 10_000
    for row in result.rows[1:]:
        assert row.evaluation["dense"]["loss"] == dense.evaluation["model"]["loss"]
        assert row.evaluation["divergence"]["kl"] > 0
        assert row.evaluation["zero_shot"]["model"]["tasks"]["piqa"]["items"] == 2
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert ComparisonResult.model_validate(saved) == result
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table == comparison_markdown(result)
    heads, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    assert heads.count("|") == lines[0].count("|") == 12
    assert "| 1 min 01 s | 1 min 00 s | 2.00 GB |" in lines[2]
    assert "8 windows of 32 tokens, no beginning-of-text token, float32" in table
    assert "over piqa, first 2 questions of each; lm-eval" in table
    perplexity = wanda.evaluation["model"]["perplexity"]
    terminal = Console(width=80, file=StringIO())
    terminal.print(comparison_table(result))
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for part in ("wanda 2:4", "1 min 01 s", "2.00 GB", f"{perplexity:.2f}"):
        assert part in shown
    # Checkpoints are as large as models, and the table does not need them.
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_finished_rows_are_not_computed_again(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    first = compare(edit(), tmp_path / "out")
    assert len(ran) == 5
    ran.clear()
    assert compare(edit(), tmp_path / "out") == first
    assert ran == []
    rows = {
        "magnitude": {"stages": [{"method": "magnitude"}]},
        "magnitude 60": {"stages": [{"method": "magnitude"}], "pattern": "0.6"},
    }
    result = compare(edit(rows), tmp_path / "out")
    assert result.rows[:2] == first.rows[:2]
    folder = Path(result.rows[2].folder).name
    assert ran == [f"prune {folder}", f"eval {folder}"]


def test_an_interrupted_comparison_goes_on(
    edit: Edit, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.comparison import run as module

    evaluate, calls = module.output_of, 0

    def stop(command: Sequence[str], log: Path) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return evaluate(command, log)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "output_of", stop)
        compare(edit(), tmp_path / "out")
    assert [command.split()[0] for command in ran] == ["eval", "prune", "eval", "prune"]
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["dense", "magnitude"]
    ran.clear()
    result = compare(edit(), tmp_path / "out")
    folder = Path(result.rows[2].folder).name
    assert ran == [f"eval {folder}"]
    assert result.rows[2].pruned is not None and not result.rows[2].pruned.resumed


def test_an_interrupted_run_goes_on_and_says_so(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    from interruption import interrupted_after

    with interrupted_after(2):
        compare(edit(), tmp_path / "out")
    result = compare(edit(), tmp_path / "out")
    pruned = [row.pruned for row in result.rows]
    assert pruned[1] is not None and pruned[1].resumed
    assert pruned[2] is not None and not pruned[2].resumed
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "| ≥ 1 min 01 s | ≥ 1 min 00 s | ≥ 2.00 GB |" in table
    assert "had been interrupted" in table


def test_another_protocol_needs_the_checkpoints(edit: Edit, ran: list[str], tmp_path: Path) -> None:
    compare(edit(), tmp_path / "kept", keep=True)
    compare(edit(), tmp_path / "not-kept")
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) > 2
    ran.clear()
    result = compare(edit(bos="window", dtype="bfloat16"), tmp_path / "kept", keep=True)
    assert result.rows[1].evaluation["protocol"]["forward_dtype"] == "bfloat16"
    assert [command.split()[0] for command in ran] == ["eval"] * 3
    ran.clear()
    compare(edit(bos="window"), tmp_path / "not-kept")
    assert [command.split()[0] for command in ran] == ["eval", "prune", "eval", "prune", "eval"]


def test_one_bad_recipe_is_refused_before_any_row(
    edit: Edit, ran: list[str], tmp_path: Path
) -> None:
    rows = {"good": {"stages": [{"method": "magnitude"}]}, "bad": {"pattern": "3:5"}}
    with pytest.raises(SecateurError, match="row bad cannot run"):
        compare(edit(rows), tmp_path / "out")
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_a_row_that_fails_does_not_stop_the_others(
    edit: Edit, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.comparison import run as module

    prune = module.measure

    def fail(command: Sequence[str], log: Path) -> Measured:
        if "magnitude" in command[6]:
            raise SecateurError("prune ended with status 1.")
        return prune(command, log)

    monkeypatch.setattr(module, "measure", fail)
    with pytest.raises(SecateurError, match="row magnitude failed: prune ended with status 1"):
        compare(edit(), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["dense", "wanda 2:4"]


def test_the_process_that_measures_stays_small() -> None:
    code = "import sys, secateur.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
