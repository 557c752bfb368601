"""A comparison as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.comparison.document import ComparisonResult, Pruned, Row, Spread
from secateur.report.format import bytes_text, seconds_text
from secateur.text.beginning import beginning_text

_HEADS = (
    "row",
    "weights",
    "sparsity",
    "perplexity",
    "95 % interval",
    "dense - row",
    "KL",
    "zero-shot",
    "time",
    "time / {yardstick}",
    "processor time",
    "peak memory",
    "size",
)
# What stands in one column on the terminal, which is narrower than a page.
_STACKED = (
    ("row",),
    ("weights", "sparsity"),
    ("perplexity", "95 % interval"),
    ("KL",),
    ("zero-shot",),
    ("time", "peak memory"),
    ("size",),
)


def comparison_table(result: ComparisonResult) -> RenderableType:
    """For the terminal: what matters most, in rows of two lines."""
    heads, rows = _columns(result)
    columns = [[heads.index(head) for head in stack if head in heads] for stack in _STACKED]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for stack in filter(None, columns):
        # Only names may wrap; a number in two pieces is none.
        first = stack == [0]
        table.add_column(
            "\n".join(heads[index] for index in stack),
            justify="left" if first else "right",
            no_wrap=not first,
        )
    for row in rows:
        cells = ("\n".join(row[index] for index in stack) for stack in columns if stack)
        table.add_row(*(cell.replace(" ± ", "\n± ") for cell in cells))
    return Group(table, Text(), *(Text(line, style="dim") for line in protocol_lines(result)))


def comparison_markdown(result: ComparisonResult) -> str:
    """For a page."""
    heads, rows = _columns(result)
    lines = [
        _line(heads),
        _line(["---" if head == "row" else "---:" for head in heads]),
        *(_line(row) for row in rows),
        "",
        *protocol_lines(result),
    ]
    return "\n".join(lines) + "\n"


def protocol_lines(result: ComparisonResult) -> list[str]:
    """How the numbers were made, in sentences."""
    first = result.rows[0].evaluation
    text, tasks, calibration = first["protocol"], first["zero_shot"], result.options["calibration"]
    lines = [
        f"Model {result.options['model']}. Perplexity: {text['text']}, {text['windows']} windows "
        f"of {text['window']} tokens, {beginning_text(text['bos'])}, {text['forward_dtype']}; "
        "intervals and differences by bootstrap over windows. KL from dense in nats per token.",
        f"Calibration: {calibration['source']}, {calibration['samples']} windows of "
        f"{calibration['length']} tokens, seed {calibration['seed']}, "
        f"{beginning_text(calibration['bos'])}. Time and peak memory: the "
        f"whole process from model on disk to result on disk; {result.machine['cores']} "
        f"cores, {result.machine['processor']}, {result.machine['device']}.",
    ]
    if tasks is not None:
        limit = "" if tasks["limit"] is None else f", first {tasks['limit']} questions of each"
        lines.append(
            f"Zero-shot: mean accuracy and its standard error over {', '.join(tasks['data'])}"
            f"{limit}; lm-eval {tasks['lm_eval']}."
        )
    made = [row.pruned for row in result.rows if row.pruned is not None]
    if any(len(each.runs) > 1 for each in made):
        lines.append("Of several runs, in turn: the median, and the range; ratios of the fastest.")
    if any(each.resumed for each in made):
        lines.append("≥: the run had been interrupted; the cost is that of its last part.")
    return lines


def _columns(result: ComparisonResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, without columns that nobody fills."""
    made = {row.name: row.pruned for row in result.rows if row.pruned is not None}
    sizes = {row.weights for row in made.values() if row.weights is not None}
    rows = [
        _cells(row, made.get(row.yardstick or ""), result.weights, sizes <= {result.weights})
        for row in result.rows
    ]
    filled = [index for index in range(len(_HEADS)) if any(row[index] for row in rows)]
    heads = [_HEADS[i].format(yardstick=result.options.get("yardstick")) for i in filled]
    return heads, [[row[i] for i in filled] for row in rows]


def _cells(row: Row, yardstick: Pruned | None, dense: int | None, equal: bool) -> list[str]:
    evaluation, pruned = row.evaluation, row.pruned
    figures, difference = evaluation["model"], evaluation["difference"]
    weights = dense if pruned is None else pruned.weights
    return [
        row.name,
        "" if equal or weights is None else f"{weights / 1e6:.2f} M",
        "" if pruned is None or pruned.sparsity is None else f"{pruned.sparsity:.4f}",
        f"{figures['perplexity']:.2f}",
        _interval(figures["interval"]),
        _difference(difference) if difference else "",
        f"{evaluation['divergence']['kl']:.4f}" if evaluation["divergence"] else "",
        _mean(evaluation["zero_shot"]),
        *([""] * 4 if pruned is None else _costs(pruned, yardstick)),
        bytes_text(row.size_bytes),
    ]


def _costs(pruned: Pruned, yardstick: Pruned | None) -> list[str]:
    at_least = "≥ " if pruned.resumed else ""
    memory = bytes_text(pruned.peak_bytes)
    if pruned.peak_device_bytes is not None:
        memory += f", {bytes_text(pruned.peak_device_bytes)} on GPU"
    return [
        at_least + _times(pruned.seconds),
        "" if yardstick is None else f"{pruned.seconds.minimum / yardstick.seconds.minimum:.2f}",
        at_least + _times(pruned.cpu_seconds),
        at_least + memory,
    ]


def _times(spread: Spread) -> str:
    """The median, and the range if there are several."""
    if spread.minimum == spread.maximum:
        return seconds_text(spread.median)
    lowest, highest = seconds_text(spread.minimum), seconds_text(spread.maximum)
    return f"{seconds_text(spread.median)} ({lowest} to {highest})"


def _difference(difference: dict[str, Any]) -> str:
    interval = _interval(difference["perplexity_interval"])
    return f"{difference['perplexity']:.2f}" + (f" ({interval})" if interval else "")


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _mean(zero_shot: dict[str, Any] | None) -> str:
    if zero_shot is None:
        return ""
    scores = zero_shot["model"]
    error = scores["mean_acc_stderr"]
    mean = f"{100 * scores['mean_acc']:.1f} %"
    return mean if error is None else f"{mean} ± {100 * error:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
