"""Try every family that transformers can build, and write what became of it into a page.

``python docs/family_table.py`` writes the marked part of docs/families.md, which takes minutes.
Names of families after it try these alone and print what became of them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402

from families import Trial, every_family, try_family  # noqa: E402

_MARKED = re.compile(r"(<!-- tried -->\n).*?(<!-- end -->)", re.DOTALL)
_SECONDS = 120
_TEXT = "the cat sat on a mat and the dog ran to the red house by the sea\n"


def main(names: list[str]) -> None:
    """Try the named families, or all of them and write the page."""
    trials: list[Trial] = []
    failures: list[str] = []
    for name in names or every_family():
        try:
            trials.append(try_apart(name))
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print(failures[-1], file=sys.stderr)
    if names or failures:
        print(table(trials))
        sys.exit("\n".join(failures) if failures else None)
    text = _MARKED.sub(
        lambda marked: f"{marked[1]}\n{table(trials)}\n{marked[2]}", PAGE.read_text("utf-8")
    )
    PAGE.write_text(text, encoding="utf-8")


def try_apart(family: str) -> Trial:
    """Try a family in a process of its own, so that whatever happens there ends there."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        trial = pool.apply_async(_try, [family]).get(_SECONDS)
    if isinstance(trial, str):
        raise RuntimeError(trial)
    print(trial.result, family, file=sys.stderr)
    return trial


def _try(family: str) -> Trial | str:
    """What became of the family; a text where a check failed, since not all errors travel."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text(_TEXT * 200, encoding="utf-8")
        try:
            return try_family(family, text, Path(scratch))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def table(trials: Iterable[Trial]) -> str:
    """What became of families, as the page shows it."""
    trials = list(trials)
    found = {
        result: [each for each in trials if each.result == result]
        for result in ("pruned", "refused", "not tried")
    }
    parts = [
        f"With transformers {transformers.__version__}: {len(found['pruned'])} are pruned, "
        f"{len(found['refused'])} refused, {len(found['not tried'])} not tried."
    ]
    if found["pruned"]:
        parts.append("## Pruned")
        parts.append(
            "| family | class | blocks | stacked experts | `shrink` |\n|---|---|---|---|---|\n"
            + "\n".join(row(each) for each in found["pruned"])
        )
    for result, title in (("refused", "Refused"), ("not tried", "Not tried")):
        if found[result]:
            parts.append(f"## {title}")
            parts.append(
                "| family | class | why |\n|---|---|---|\n"
                + "\n".join(row(each) for each in found[result])
            )
    return "\n\n".join(parts) + "\n"


def row(trial: Trial) -> str:
    """The line of a family."""
    cells = [trial.family, trial.model]
    if trial.result == "pruned":
        cells += [f"`{trial.blocks}`", trial.experts, trial.shrink]
    else:
        cells.append(trial.why.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
