"""The file that results are kept in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection
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

    Runs of tools in ``reused`` count whatever the package was when they were made.
    """

    def __init__(self, file: Path, settings: Json, reused: Collection[str] = ()):
        self.file = file
        self.settings = settings
        self.code = digest_of((REPOSITORY / "src").rglob("*.py"))
        self.commit = commit()
        self.reused = reused
        self.content: dict[str, list[Json]] = {"dense": [], "runs": []}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def dense(self, measure: Callable[[], Json]) -> Json:
        """Return the dense model's entry under these settings; measured now if there is none."""
        matching = [e for e in self.content["dense"] if e["settings"] == self.settings]
        if matching:
            return matching[-1]
        entry = measure()
        self.add("dense", entry)
        return entry

    def runs(self, tool: str, contender: Named) -> list[Json]:
        """Return the runs made under these settings by the code that is here now, or reused."""
        return [
            run
            for run in self.content["runs"]
            if (run["tool"], run["contender"]) == (tool, contender.name)
            and run["settings"] == self.settings
            and (run["code"] == self.code or tool in self.reused)
        ]

    def best(self, tool: str, contender: Named) -> Json | None:
        """Return the fastest of the runs that count and were made by the newest code."""
        runs = self.runs(tool, contender)
        newest = [run for run in runs if run["code"] == runs[-1]["code"]]
        return min(newest, key=lambda run: run["seconds"], default=None)

    def add(self, kind: str, entry: Json) -> None:
        """Add an entry and write the file."""
        origin = {"commit": self.commit, "code": self.code, "settings": self.settings}
        self.content[kind].append(entry | origin)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.file)
