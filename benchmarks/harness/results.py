"""The file that results are kept in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from harness.measuring import Json, digest_of

REPOSITORY = Path(__file__).resolve().parents[2]


class Named(Protocol):
    """Whatever runs."""

    @property
    def name(self) -> str: ...


def commit() -> str:
    """Return the commit that is checked out and whether the package differs from it."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "no commit"
    state = subprocess.run(
        [*git, "status", "--porcelain", "--", "src"], capture_output=True, text=True
    )
    return head.stdout.strip() + (" with changes" if state.stdout.strip() else "")


class Results:
    """The output file: every run ever made, and which of them count for these settings.

    Runs of tools in ``reused`` count whatever the package was when they were made, and with
    ``any_machine`` wherever they were: perplexities can be compared then, times cannot. ``only_of``
    names settings that the results of a single tool depend on, and that tool.
    """

    def __init__(
        self,
        file: Path,
        settings: Json,
        reused: Collection[str] = (),
        *,
        any_machine: bool = False,
        only_of: Mapping[str, str] | None = None,
    ):
        self.file = file
        self.settings = settings
        self.any_machine = any_machine
        self.only_of = only_of or {}
        self.code = digest_of((REPOSITORY / "src").rglob("*.py"))
        self.commit = commit()
        self.reused = reused
        self.content: dict[str, list[Json]] = {"dense": [], "runs": []}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def dense(self, measure: Callable[[], Json]) -> Json:
        """Return the dense model's entry under these settings; measured now if there is none."""
        matching = [e for e in self.content["dense"] if self._counts(e)]
        here = [e for e in matching if self.is_of_this_machine(e)]
        if matching:
            return (here or matching)[-1]
        entry = measure()
        self.add("dense", entry)
        return entry

    def runs(self, tool: str, contender: Named) -> list[Json]:
        """Return the runs made under these settings by the code that is here now, or reused."""
        return [
            run
            for run in self.content["runs"]
            if (run["tool"], run["contender"]) == (tool, contender.name)
            and self._counts(run)
            and (run["code"] == self.code or tool in self.reused)
        ]

    def is_of_this_machine(self, entry: Json) -> bool:
        """Whether times of an entry can be compared with those measured now."""
        return bool(entry["settings"]["machine"] == self.settings["machine"])

    def _counts(self, entry: Json) -> bool:
        ignored = {key for key, tool in self.only_of.items() if entry.get("tool") != tool}
        if self.any_machine:
            ignored.add("machine")
        ignoring = dict.fromkeys(ignored)
        return bool(entry["settings"] | ignoring == self.settings | ignoring)

    def best(self, tool: str, contender: Named) -> Json | None:
        """Return the fastest of the runs that count and were made by the newest code.

        Those of this machine come first.
        """
        runs = self.runs(tool, contender)
        runs = [run for run in runs if self.is_of_this_machine(run)] or runs
        newest = [run for run in runs if run["code"] == runs[-1]["code"]]
        return min(newest, key=lambda run: run["seconds"], default=None)

    def add(self, kind: str, entry: Json) -> None:
        """Add an entry and write the file."""
        origin = {"commit": self.commit, "code": self.code, "settings": self.settings}
        self.content[kind].append(entry | origin)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.file)
