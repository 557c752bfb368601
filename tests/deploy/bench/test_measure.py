"""Turns by processes whose times are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from secateur.deploy.bench.measure import Contest, measure, tasks
from secateur.deploy.bench.options import BenchOptions
from secateur.deploy.bench.worker import Task, Turn
from secateur.runs.errors import SecateurError
from secateur.runs.progress import silent


class Scripted:
    """Takes as long as it is told, in as many slices as it is told."""

    def __init__(self, name: str, seconds: Callable[[Task, int], float], heard: list[str]) -> None:
        self.name, self.seconds, self.heard = name, seconds, heard
        self.slices, self.turn = 2, 0

    def begin(self, task: Task) -> None:
        self.task, self.left = task, self.slices

    def run(self, seconds: float | None) -> Turn | None:
        self.heard.append(self.name)
        self.left -= 1
        if seconds is not None and self.left:
            return None
        self.turn += 1
        took = self.seconds(self.task, self.turn)
        return Turn(took, took, took)


def contest(*workers: Scripted, threads: int = 1, device: str = "cpu") -> Contest:
    bases = [None, *[0] * (len(workers) - 1)]
    return Contest.of(workers, bases, [device] * len(workers), threads)  # type: ignore[arg-type]


def test_slices_go_round_and_the_first_moves_on() -> None:
    heard: list[str] = []
    both = contest(*(Scripted(name, lambda *_: 1.0, heard) for name in "ab"))
    both.round(Task("decode"), 0)
    assert "".join(heard) == "abab"
    heard.clear()
    both.round(Task("decode"), 1)
    assert "".join(heard) == "baba"


def test_a_device_is_not_cut_into_slices_and_threads_are_timed_by_the_wall() -> None:
    heard: list[str] = []
    workers = [Scripted(name, lambda *_: 1.0, heard) for name in "ab"]
    contest(*workers, device="GPU").round(Task("decode"), 0)
    assert "".join(heard) == "ab"
    assert contest(*workers).processor == [True, True]
    assert contest(*workers, threads=2).processor == [False, False]
    assert contest(*workers, device="GPU").processor == [False, False]


def test_ratios_that_are_known_need_no_more_turns() -> None:
    base = Scripted("a", lambda task, turn: 2.0 * turn, [])
    twice = Scripted("b", lambda task, turn: 1.0 * turn, [])
    options = BenchOptions.of(batch=[1], limit=60)
    found = measure(contest(base, twice), options, silent)
    assert [len(series.turns[0]) for series in found.series] == [5, 5, 5]
    assert contest(base, twice).ratios(found.series[0], 1, 0) == [2.0] * 5


def test_others_are_measured_more_often_until_the_time_is_over() -> None:
    base = Scripted("a", lambda *_: 1.0, [])
    odd = Scripted("b", lambda task, turn: 1.0 + turn % 2, [])
    found = measure(contest(base, odd), BenchOptions.of(batch=[1], limit=60), silent)
    assert all(len(series.turns[0]) == 100 for series in found.series)
    found = measure(contest(base, odd), BenchOptions.of(batch=[1], limit=1e-9), silent)
    assert all(len(series.turns[0]) == 5 for series in found.series)


def test_batches_that_take_too_long_are_left_out_with_a_sentence() -> None:
    same = [Scripted(name, lambda *_: 1.0, []) for name in "ab"]
    found = measure(contest(*same), BenchOptions.of(batch=[1, 4], limit=1e-9), silent)
    assert [(series.task.work, series.task.batch) for series in found.series] == [
        ("load", 1), ("prefill", 1), ("decode", 1),
    ]  # fmt: skip
    first, second = found.left_out
    assert first.startswith("Prefill of 4 × 512 tokens would take about")
    assert second.startswith("Decoding of 4 × 64 tokens would take about")


def test_the_protocol() -> None:
    assert tasks(BenchOptions()) == [
        Task("load"),
        *[
            task
            for batch in (1, 4, 16)
            for task in (Task("prefill", batch, 512, 512), Task("decode", batch, 32, 64))
        ],
    ]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"batch": "1,x"}, "batch is not valid: whole numbers, such as 1,4,16"),
        ({"batch": "0"}, "batch is not valid: sizes from 1 to 1024"),
        ({"batch": "1000000"}, "batch is not valid: sizes from 1 to 1024"),
        ({"batch": []}, "batch is not valid: sizes"),
        ({"decode": -3}, "decode is not valid"),
        ({"turns": 4}, "turns is not valid"),
        ({"limit": float("nan")}, "limit is not valid"),
        ({"threads": 0}, "threads is not valid"),
        ({"runtimes": ["lama.cpp"]}, "did you mean llama.cpp?"),
        ({"bach": "1"}, "did you mean batch?"),
    ],
)
def test_options_that_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(SecateurError) as error:
        BenchOptions.of(**values)
    assert reason in str(error.value)


def test_sizes_are_read_from_a_word() -> None:
    assert BenchOptions.of(batch="16, 1,4,4").batch == (1, 4, 16)
