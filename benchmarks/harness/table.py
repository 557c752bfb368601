"""Results as a Markdown table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median

from harness.contender import OURS, PEER, Contender
from harness.measuring import Json
from harness.results import Results


def table(results: Results, contenders: Sequence[Contender], dense: float) -> list[str]:
    """Return the Markdown table of the best run of each contender, and notes below it.

    Where there are several patterns, ``grid`` stands above it.
    """
    best: dict[tuple[str, str], Json] = {}
    notes: list[str] = []
    for contender in contenders:
        for tool in contender.tools:
            runs = results.runs(tool, contender)
            if refused := next((run["refused"] for run in runs if run["refused"]), None):
                notes.append(f"Not shown: {tool} {contender.name}, {refused}.")
            elif found := results.best(tool, contender):
                best[tool, contender.name] = found

    contenders = sorted(contenders, key=lambda c: (c.pattern or "", c.sparsity))
    columns = [
        "tool",
        "method",
        "pattern",
        "counted sparsity",
        f"perplexity (dense {dense:.2f})",
        "time",
        "processor time",
        f"time / {PEER}, same method",
        f"time / {PEER} SparseGPT",
        "peak memory",
        "commit",
    ]
    rows: list[list[str]] = []
    for contender in contenders:
        yardsticks = [
            best.get((PEER, contender.name)) if contender.plain else None,
            best.get((PEER, f"sparsegpt-{contender.name.rpartition('-')[2]}")),
        ]
        rows += [
            row(tool, contender, best[tool, contender.name], yardsticks, results)
            for tool in contender.tools
            if (tool, contender.name) in best
        ]
    lines = markdown_table(columns, rows, left={"tool", "method", "pattern", "commit"})
    above: list[str] = []
    if len({contender.pattern_label for contender in contenders}) > 1:
        above = grid(results, contenders, best, dense)
    return [*above, *lines, "", *protocol_lines(results.settings), *notes]


def grid(
    results: Results,
    contenders: Sequence[Contender],
    best: Mapping[tuple[str, str], Json],
    dense: float,
) -> list[str]:
    """Return perplexities as methods by patterns; a dash is no contender, an empty field not run.

    Processor time is the median over the patterns, memory the most of them, both of runs of this
    machine.
    """
    patterns = dict.fromkeys(
        contender.pattern_label
        for contender in contenders
        if any((tool, contender.name) in best for tool in contender.tools)
    )
    methods = dict.fromkeys(
        (tool, contender.method_label) for contender in contenders for tool in contender.tools
    )
    names = {
        (contender.method_label, contender.pattern_label): contender.name
        for contender in contenders
    }
    rows: list[list[str]] = []
    for tool, method in methods:
        found = {
            pattern: best.get((tool, names.get((method, pattern), ""))) for pattern in patterns
        }
        runs = [run for run in found.values() if run]
        if not runs:
            continue
        here = [run for run in runs if results.is_of_this_machine(run)]
        rows.append(
            [
                f"{PEER}, {method}" if tool == PEER else method,
                *(
                    f"{run['perplexity']:.2f}" if run else "" if (method, pattern) in names else "–"
                    for pattern, run in found.items()
                ),
                f"{median(run['cpu_seconds'] for run in here):.0f} s" if here else "",
                f"{max(run['peak_bytes'] for run in here) / 1e9:.2f} GB" if here else "",
                ", ".join(dict.fromkeys(run["commit"] for run in runs)),
            ]
        )
    columns = ["method", *patterns, "processor time", "peak memory", "commits"]
    lines = markdown_table(columns, rows, left={"method", "commits"})
    note = f"Perplexity, dense {dense:.2f}. A dash: n:m leaves no rates to choose."
    return [*lines, "", note, ""]


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]
) -> list[str]:
    """Return a table without the columns that say nothing; those in ``left`` are not numbers."""
    told = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    return [
        "| " + " | ".join(columns[place] for place in told) + " |",
        "|" + "|".join("---" if columns[place] in left else "---:" for place in told) + "|",
        *("| " + " | ".join(row[place] for place in told) + " |" for row in rows),
    ]


def row(
    tool: str,
    contender: Contender,
    run: Json,
    yardsticks: Sequence[Json | None],
    results: Results,
) -> list[str]:
    """Return the cells of one line; ``yardsticks`` are the runs that ours is divided by.

    Times and ratios are those of this machine.
    """
    here = results.is_of_this_machine(run)
    yardsticks = [
        peer if peer and results.is_of_this_machine(peer) else None for peer in yardsticks
    ]
    return [
        tool,
        contender.method_label,
        contender.pattern_label,
        f"{run['sparsity']:.4f}",
        f"{run['perplexity']:.2f}",
        f"{run['seconds']:.0f} s" if here else "",
        f"{run['cpu_seconds']:.0f} s" if here else "",
        *(
            f"{run['seconds'] / peer['seconds']:.2f}" if peer and here and tool == OURS else ""
            for peer in yardsticks
        ),
        f"{run['peak_bytes'] / 1e9:.2f} GB",
        run["commit"],
    ]


def protocol_lines(settings: Json) -> list[str]:
    """Return the protocol and the machine in sentences."""
    s, machine, peer = settings, settings["machine"], settings["peer"]
    windows = f"first {s['windows']} windows" if s["windows"] else "all windows"
    return [
        f"Calibration: {s['calibration']}, {s['samples']} windows of {s['length']} tokens, seed "
        f"{s['seed']}. Perplexity: {s['text']}, {windows} of {s['window']} tokens, bf16 autocast. "
        "Time and peak resident size of the whole process, the fastest run of each.",
        f"{machine_line(machine)} {PEER} {peer['llmcompressor']}, batches of {peer['batch size']}.",
    ]


def machine_line(machine: Json) -> str:
    """Return the machine in a sentence."""
    return (
        f"Machine: {machine['cores']} cores, {machine['processor']}, "
        f"{'AMX' if machine['amx'] else 'no AMX'}, torch {machine['torch']}."
    )


def publish(lines: Sequence[str], markdown: Path | None) -> None:
    """Print lines and the command that made them, and write them to a file if one is named."""
    text = "\n".join([*lines, f"Command: `{shlex.join(['python', *sys.argv])}`."]) + "\n"
    print(text)
    if markdown:
        markdown.write_text(text, encoding="utf-8")
