"""Where the commands print, and how long work shows that it is alive."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from secateur.report.format import bytes_text
from secateur.runs.errors import printable
from secateur.runs.progress import Progress as Callback

if TYPE_CHECKING:
    from secateur.report.documents.prune import Needs

# Paths and names are the user's: nothing in them is markup.
stdout = Console(highlight=False, markup=False, emoji=False)
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Seconds between two lines about the same phase, where no bar can move.
_BETWEEN_LINES = 30.0
# What a bar says before the first phase.
_READY = "Getting ready"


@dataclass
class _Phase:
    """Work that is under way.

    Attributes:
        name: what is being done.
        done: steps that are finished.
        total: steps in all.
        found: steps that were finished when the phase was first heard of.
        began: when that was.
        heard: when it was last heard of.
    """

    name: str
    done: int
    total: int
    found: int
    began: float = field(default_factory=lambda: time.monotonic())
    heard: float = 0.0

    @property
    def times(self) -> str:
        """Time since the phase began, and what is left of it if that can be told."""
        spent, steps = self.heard - self.began, self.done - self.found
        if self.done >= self.total:
            return _clock(spent)
        waited = time.monotonic() - self.heard
        gone = _clock(spent + waited)
        if steps <= 0:
            return gone
        left = spent / steps * (self.total - self.done) - waited
        return f"{gone}, {_clock(max(left, 0))} left"


@contextmanager
def progress_bars() -> Iterator[Callback]:
    """Show on stderr how far each phase is: a bar on a terminal, else a line now and then."""
    with _bars() if stderr.is_terminal else _lines() as show:
        phases: dict[str, _Phase] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in phases or done < phases[name].done:
                phases[name] = _Phase(name, done, total, found=done)
            phase = phases[name]
            phase.done, phase.total, phase.heard = done, total, time.monotonic()
            show(phase)

        yield update


@contextmanager
def _bars() -> Iterator[Callable[[_Phase], None]]:
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[phase].times}"),
    )
    with Progress(*columns, console=stderr) as bars:
        # A model that loads tells of no steps.
        ready = _Phase(_READY, done=0, total=1, found=0, heard=time.monotonic())
        tasks: dict[str, TaskID] = {_READY: bars.add_task(_READY, total=None, phase=ready)}

        def show(phase: _Phase) -> None:
            if (first := tasks.pop(_READY, None)) is not None:
                bars.remove_task(first)
            if phase.name not in tasks:
                tasks[phase.name] = bars.add_task(phase.name, total=phase.total, phase=phase)
            bars.update(tasks[phase.name], completed=phase.done, total=phase.total, phase=phase)

        yield show


@contextmanager
def _lines() -> Iterator[Callable[[_Phase], None]]:
    under_way: dict[str, _Phase] = {}
    began = time.monotonic()
    ended = threading.Event()

    def tell(phase: _Phase) -> None:
        stderr.print(f"{phase.name}: {phase.done} of {phase.total}, {phase.times}", soft_wrap=True)

    def show(phase: _Phase) -> None:
        if phase.done < phase.total:
            under_way[phase.name] = phase
        elif under_way.pop(phase.name, None):
            tell(phase)

    def watch() -> None:
        while not ended.wait(_BETWEEN_LINES):
            for phase in list(under_way.values()):
                tell(phase)
            if not under_way:
                # Between phases, and while a model loads.
                stderr.print(f"At work: {_clock(time.monotonic() - began)}")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield show
    finally:
        ended.set()
        watcher.join()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str, path: Path | None = None, rest: str = "", style: str = "") -> None:
    """Print one line to stdout, a path in it emphasised, and never broken."""
    said = Text.assemble(_lines_of(text), (printable(str(path or "")), "bold"), _lines_of(rest))
    said.stylize(style)
    stdout.print(said, soft_wrap=True)


def page_of(output: Path) -> Path:
    """The HTML page about a run in a folder."""
    return output / "secateur" / "report.html"


def show_table(table: RenderableType, notes: Iterable[str]) -> None:
    """Show a table, and what the user should know."""
    stdout.print(table)
    show_notes(notes)


def show_notes(notes: Iterable[str]) -> None:
    """Show what the user should know, on stderr."""
    for note in notes:
        stderr.print(Text.assemble(("note", "yellow"), " ", _lines_of(note)))


def show_result(table: RenderableType, notes: Iterable[str], output: Path) -> None:
    """Show a finished run: its table, what the user should know, and where the files are."""
    show_table(table, notes)
    say("Saved to ", output, f"; every number is in {output / 'report.json'}.")
    say("To look at: ", page_of(output))


def complain(sentence: str) -> None:
    """Print an error to stderr, as a sentence that ends."""
    sentence += "" if sentence.endswith((".", "?", "!")) else "."
    stderr.print(Text.assemble(("error", "bold red"), " ", _lines_of(sentence)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON to stdout, unstyled and unwrapped."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _lines_of(text: str) -> str:
    """The text without control characters; its lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def show_needs(needs: Needs, as_json: bool) -> None:
    """What a run would need."""
    if as_json:
        print_json(needs.model_dump(mode="json"))
    else:
        say(f"Peak memory: about {bytes_text(needs.peak_memory_bytes)}.")
