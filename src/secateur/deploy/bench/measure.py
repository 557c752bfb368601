"""Turns of several models, one after the other, until their ratios are known."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from secateur.deploy.bench.options import BenchOptions
from secateur.deploy.bench.statistics import pairwise_ratios, relative_width
from secateur.deploy.bench.worker import CAN_PAUSE, Task, Turn, Worker
from secateur.runs.progress import Progress

# Ratios are known well enough when half of their interval is as much of them.
_NARROW = 0.01
# So many turns teach nothing new.
_MOST_TURNS = 100
# A slow spell of a machine lasts longer than this, and a cache is filled in less.
SLICE = 0.02


@dataclass
class Series:
    """What the turns of one task took.

    Attributes:
        task: what was timed.
        turns: of each model, in the order of the models.
        others: core-seconds that other processes used meanwhile.
        seconds: wall time of all turns.
    """

    task: Task
    turns: list[list[Turn]]
    others: float = 0.0
    seconds: float = 0.0

    def times(self, model: int, *, processor: bool) -> list[float]:
        """Seconds of a model by one of the clocks."""
        return [each.processor_seconds if processor else each.seconds for each in self.turns[model]]

    def add(self, once: Series) -> None:
        """Add another round."""
        for turns, more in zip(self.turns, once.turns, strict=True):
            turns += more
        self.others += once.others
        self.seconds += once.seconds


@dataclass(frozen=True)
class Contest:
    """Models that are measured in turn.

    Attributes:
        workers: processes that have them.
        bases: for each, the place of the one that it is held against.
        processor: for each, whether its clock is processor time.
        sliced: whether the turns of a round go on side by side, a slice of each at a time.
    """

    workers: Sequence[Worker]
    bases: Sequence[int | None]
    processor: Sequence[bool]
    sliced: bool

    @classmethod
    def of(
        cls,
        workers: Sequence[Worker],
        bases: Sequence[int | None],
        devices: Sequence[str],
        threads: int,
    ) -> Contest:
        """Choose clocks and slices.

        Threads that wait for each other use processor time, so it tells little where there are
        several; and a device works on while its process is stopped.
        """
        on_processor = [device == "cpu" for device in devices]
        return cls(
            workers,
            bases,
            [each and threads == 1 for each in on_processor],
            CAN_PAUSE and all(on_processor) and len(workers) > 1,
        )

    def round(self, task: Task, number: int) -> Series:
        """One turn of each model; the order moves on by one from round to round."""
        count = len(self.workers)
        found: dict[int, Turn] = {}
        busy, began = _busy(), time.monotonic()
        for each in self.workers:
            each.begin(task)
        order = deque((number + place) % count for place in range(count))
        while order:
            place = order.popleft()
            turn = self.workers[place].run(SLICE if self.sliced else None)
            if turn is None:
                order.append(place)
            else:
                found[place] = turn
        seconds = time.monotonic() - began
        own = sum(turn.spent for turn in found.values())
        turns = [[found[place]] for place in range(count)]
        return Series(task, turns, max(0.0, _busy() - busy - own), seconds)

    def ratios(self, series: Series, model: int, base: int) -> list[float]:
        """How many times faster than its base a model was in each turn, by the clock of both."""
        clock = self.processor[model] and self.processor[base]
        return pairwise_ratios(
            series.times(base, processor=clock), series.times(model, processor=clock)
        )

    def width(self, series: Series) -> float:
        """How far off the ratios may be, as a share of them; of one model alone, its times."""
        if len(self.workers) == 1:
            return relative_width(series.times(0, processor=self.processor[0]))
        return max(
            relative_width(self.ratios(series, model, base))
            for model, base in enumerate(self.bases)
            if base is not None
        )


@dataclass
class Measured:
    """All series, and which tasks would have taken too long."""

    series: list[Series] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def measure(contest: Contest, options: BenchOptions, progress: Progress) -> Measured:
    """Time every task on every model.

    The first batch size is measured whatever it takes; of others, what would not fit into the
    limit is left out.
    """
    found = Measured()
    warm: dict[str, Series] = {}
    for task in tasks(options):
        before = warm.get(task.work)
        needed = 0.0 if before is None else _expected(before, task, options.turns)
        if needed <= options.limit:
            warm[task.work] = contest.round(task, 0)
            needed = options.turns * warm[task.work].seconds
            if before is None or needed <= options.limit:
                found.series.append(_series(contest, task, options, progress))
                continue
        found.left_out.append(
            f"{phase_of(task)} would take about {needed:.0f} s for {options.turns} turns of all "
            f"models and is left out; a larger --limit measures it."
        )
    return found


def tasks(options: BenchOptions) -> list[Task]:
    """What is timed, small batches first."""
    found = [Task("load")]
    for batch in options.batch:
        found.append(Task("prefill", batch, options.prefill, options.prefill))
        found.append(Task("decode", batch, options.prompt, options.decode))
    return found


def phase_of(task: Task) -> str:
    """What is timed, in words."""
    match task.work:
        case "load":
            return "Loading"
        case "prefill":
            return f"Prefill of {task.batch} × {task.tokens} tokens"
    return f"Decoding of {task.batch} × {task.tokens} tokens"


def _expected(before: Series, task: Task, turns: int) -> float:
    """What the turns will take at least, by the warm-up with the batch size before."""
    larger = task.batch / before.task.batch if task.work == "prefill" else 1.0
    return turns * larger * before.seconds


def _series(contest: Contest, task: Task, options: BenchOptions, progress: Progress) -> Series:
    """Take turns until the ratios are known, or the time is over."""
    series = Series(task, [[] for _ in contest.workers])
    began = time.monotonic()
    while True:
        done = len(series.turns[0])
        spent = time.monotonic() - began
        enough = done >= options.turns and (
            done >= max(_MOST_TURNS, options.turns)
            or spent + spent / done > options.limit
            or contest.width(series) <= _NARROW
        )
        progress(phase_of(task), done, done if enough else max(done + 1, options.turns))
        if enough:
            return series
        series.add(contest.round(task, done))


def _busy() -> float:
    """Core-seconds that the machine has worked since it started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Time of guests is part of that of users.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guests)
