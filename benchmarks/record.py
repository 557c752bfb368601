"""Keep what comparisons have measured, one line a row, and print it as a table.

    python benchmarks/record.py one_shot/comparison.json benchmarks/results/one_shot.jsonl
    python benchmarks/record.py benchmarks/results/block_methods.jsonl

Given a comparison, appends its rows with the commit that is checked out. Prints methods by
patterns: perplexity, processor time as the median over the patterns, peak memory as the most,
both of the machine that measured the most lines; of a row that ran again the last run counts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Line = dict[str, Any]


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def lines_of(comparison: Line) -> list[Line]:
    """The rows of a ``comparison.json``."""
    machine, text = comparison["machine"], comparison["options"]["calibration"]
    evaluation = comparison["options"]["evaluation"]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    origin = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": f"{machine['cores']} cores, {machine['processor']}, {machine['device']}, "
        f"torch {machine['versions']['torch']}",
        "protocol": f"{text['source']} {text['samples']} x {text['length']}, seed {text['seed']}; "
        f"{evaluation['text'] or evaluation['dataset']} {evaluation['max_windows'] or 'all'} x "
        f"{evaluation['window']}",
    }
    lines = []
    for row in comparison["rows"]:
        found, made = row["evaluation"], row["pruned"]
        name, pattern = re.fullmatch(r"(.*?)(?:, (\d+:\d+|0?\.\d+))?", row["name"]).groups()
        line = {"name": name, "pattern": pattern and re.sub(r"^0?\.\d+$", percent, pattern)}
        if made is not None:
            line |= {"sparsity": made["sparsity"], "weights": made["weights"]}
            line |= {key: made[key]["median"] for key in ("seconds", "cpu_seconds")}
            line |= {"peak_bytes": max(run["peak_bytes"] for run in made["runs"])}
            line |= {"size_bytes": made["size_bytes"], "kl": found["divergence"]["kl"]}
        if found["zero_shot"] is not None:
            line["zero_shot"] = found["zero_shot"]["model"]["mean_acc"]
        figures = {key: found["model"][key] for key in ("perplexity", "interval")}
        line = line | figures | origin
        lines.append({key: value for key, value in line.items() if value is not None})
    return lines


def percent(share: re.Match[str]) -> str:
    return f"{100 * float(share[0]):g}%"


def table(lines: Sequence[Line]) -> str:
    measured = [line for line in lines if "seconds" in line]
    patterns = list(dict.fromkeys(line.get("pattern", "") for line in measured))
    usual = Counter(line["machine"] for line in measured).most_common(1)[0][0]
    measured.sort(key=lambda line: line["machine"] == usual)
    heads = ["method", *patterns, "processor time", "peak memory", "commits"]
    rule = ["---", *["---:"] * (len(heads) - 2), "---"]
    rows = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|"]
    for name in dict.fromkeys(line["name"] for line in lines if "seconds" in line):
        runs = {line.get("pattern", ""): line for line in measured if line["name"] == name}
        runs = {pattern: runs[pattern] for pattern in patterns if pattern in runs}
        here = [run for run in runs.values() if run["machine"] == usual]
        cells = [f"{runs[each]['perplexity']:.2f}" if each in runs else "" for each in patterns]
        cells += [f"{median(run['cpu_seconds'] for run in here):.0f} s" if here else ""]
        cells += [f"{max(run['peak_bytes'] for run in here) / 1e9:.2f} GB" if here else ""]
        cells += [", ".join(dict.fromkeys(run["commit"] for run in runs.values()))]
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows)


def main() -> None:
    *comparisons, results = map(Path, sys.argv[1:])
    for each in comparisons:
        lines = lines_of(json.loads(each.read_text(encoding="utf-8")))
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(table(read(results)))


if __name__ == "__main__":
    main()
