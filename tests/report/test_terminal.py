"""What the terminal shows of a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, RenderableType
from transformers import AutoModelForCausalLM

import secateur
from secateur.patterns.pattern import parse_pattern
from secateur.patterns.plan import Plan
from secateur.report.documents.prune import Report
from secateur.report.documents.shrink import ShrinkReport, SubBlockReport
from secateur.report.terminal import plan_table, report_table, shrink_table
from tiny import make_tokenizer


def report_of(folder: Path, text_file: Path, *methods: str) -> Report:
    recipe = secateur.Recipe.from_mapping(
        {
            "stages": [{"method": method} for method in methods],
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    return secateur.prune(model, recipe, tokenizer=make_tokenizer()).report


def shown(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_learned_rates_are_shown_by_linear_and_by_row(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    report = report_of(checkpoints("llama"), text_file, "besa-rates")
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    for block in report.blocks:
        for name, linear in block.linears.items():
            rows = model.get_submodule(f"model.layers.{block.index}.{name}").out_features
            assert sum(linear.rows) == rows
    text = shown(report_table(report))
    assert "rows from 0 to 100 %" in text
    assert "mlp.down_proj" in text
    assert "█" in text
    assert "besa-rates: held-out error" in text


def test_even_rates_need_no_table(checkpoints: Callable[..., Path], text_file: Path) -> None:
    assert "rows from 0" not in shown(
        report_table(report_of(checkpoints("llama"), text_file, "wanda"))
    )


def test_widths_are_groups_by_query_heads_where_heads_share_keys(runs: dict[str, Path]) -> None:
    report = ShrinkReport.model_validate_json((runs["small"] / "report.json").read_text())

    def attention(kept: int, of: int, queries: int, queries_of: int) -> str:
        part = SubBlockReport(
            block=0, kind="attention", kept=kept, of=of, queries=queries, queries_of=queries_of,
            parameters=0,
        )  # fmt: skip
        channels = SubBlockReport(block=0, kind="ffn", kept=1000, of=1536, parameters=0)
        return shown(shrink_table(report.model_copy(update={"sub_blocks": [part, channels]})))

    assert "2 × 1 of 3 × 3" in attention(2, 3, 1, 3)
    assert "0 of 3 × 3" in attention(0, 3, 3, 3)
    assert "5 of 12" in attention(5, 12, 1, 1)
    assert "1,000 of 1,536" in attention(3, 3, 3, 3)


def test_names_in_brackets_are_no_markup() -> None:
    name = "x[/bold].q[red]:smile:"
    plan = Plan(parse_pattern("0.5"), {name: 4}, {name: 2})
    assert name in shown(plan_table(plan))
